"""Towers pruned by `apply` behind which images are tiles, cut and with newlines."""

import copy

import pytest
import torch
from helpers import vlm
from helpers.vlm import forward_with_features, full_positions, masked, rows_of, without_nan

import cropr_kernels as cropr
from cropr_kernels.vlm.shortening import shorten

TILED = ["LLaVA-NeXT", "LLaVA-OneVision"]
COUNTS = [64 + 8 * 9, 64 + 16 * 5]  # a tile, and two above each other, of which half is padding


def tiled_inputs(name):
    """Return inputs of a row with two images, before a text."""
    torch.manual_seed(1)
    inputs = {
        "pixel_values": torch.randn(2, 3, 3, 32, 32),
        "image_sizes": torch.tensor([[32, 32], [64, 16]]),
    }
    if name == "LLaVA-OneVision":
        inputs["batch_num_images"] = torch.ones(2, dtype=torch.long)
    ids = torch.tensor([vlm.prompt_of(name, COUNTS)])
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def merged(name, keep):
    model = vlm.make(name)
    cropr.apply(model.model.vision_tower, rate=8, num_outputs=0, merge=True)
    torch.manual_seed(2)
    return cropr.prune_image_tokens(model, keep, query=torch.randn(32))


def features(model, inputs):
    names = ("pixel_values", "image_sizes", "batch_num_images")
    arguments = {name: inputs[name] for name in names if name in inputs}
    return model.model.get_image_features(**arguments, return_dict=True)


def packed_sizes(model, inputs):
    """Return the sizes of the rows of both images, from those of the tiles."""
    tiles = torch.cat([inputs["pixel_values"][0, :2], inputs["pixel_values"][1]])
    model.model.vision_tower(tiles)
    sizes = model.cropr_image_tokens.dense.marks.sizes.clone()
    assert sizes.shape == (5, 64)
    first = torch.cat([sizes[1].view(8, 8), torch.ones(8, 1)], 1)
    second = torch.cat([sizes[3:].reshape(16, 8)[:, 2:6], torch.ones(16, 1)], 1)
    return torch.cat([sizes[0], first.flatten(), sizes[2], second.flatten()])


@pytest.mark.parametrize("name", TILED)
@torch.no_grad()
def test_rows_of_tiles_have_the_sizes_of_merged_patches(name):
    model = merged(name, 12)
    inputs = tiled_inputs(name)
    expected = packed_sizes(model, inputs)
    output, sizes = model.cropr_image_tokens.dense.features(lambda: features(model, inputs))
    assert torch.equal(sizes, expected) and sizes.max() > 2
    assert torch.equal(rows_of(output.pooler_output).isfinite().all(1), sizes > 0)
    other = copy.deepcopy(model)
    _, copied = other.cropr_image_tokens.dense.features(lambda: features(other, inputs))
    assert torch.equal(copied, sizes)
    with torch.enable_grad():  # in two passes
        output, sizes = model.cropr_image_tokens.dense.features(lambda: features(model, inputs))
    assert torch.equal(sizes, expected)
    assert all(entry.isfinite().all() for entry in output.pooler_output)
    cropr.restore_image_tokens(model)
    assert "pack_image_features" not in vars(model.model)


@pytest.mark.parametrize("name", TILED)
@torch.no_grad()
def test_merged_rows_of_tiles_are_chosen_by_their_sizes_and_equal_masking(name):
    plain = vlm.make(name)
    model = merged(name, 12)
    inputs = tiled_inputs(name)
    sizes = packed_sizes(model, inputs)
    output, _ = model.cropr_image_tokens.dense.features(lambda: features(model, inputs))
    _, columns = shorten(model, inputs, None, True)
    kept = []
    start = 0
    places = (inputs["input_ids"][0] == vlm.IMAGE).nonzero().squeeze(1)
    for rows, part in zip(output.pooler_output, sizes.split(COUNTS)):
        survivors = part.nonzero().squeeze(1)
        scores = rows[survivors] @ model.cropr_image_tokens.query
        plain_best = vlm.best_of_runs(scores, 12)
        scores = scores + 2 * scores.std(unbiased=False) * part[survivors].log()
        best = vlm.best_of_runs(scores, 12)
        assert not torch.equal(best, plain_best)
        kept.append(places[start + survivors[best]])
        start += len(rows)
    chosen = columns.index[0][torch.isin(columns.index[0], places)]
    assert torch.equal(chosen, torch.cat(kept))

    output.pooler_output = without_nan(output.pooler_output)
    positions = full_positions(plain, inputs)
    full = masked(plain, inputs, columns)
    expected = forward_with_features(plain, full, output, position_ids=positions)
    expected = expected.gather(1, columns.index.unsqueeze(-1).expand(-1, -1, 60))
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    cropr.restore_image_tokens(model)
    cropr.remove(model.model.vision_tower)
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
