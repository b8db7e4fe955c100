"""Towers that prune inside, and hand their tokens on to the language model."""

import copy

import pytest
import torch
from helpers import vlm
from helpers.vlm import (
    GREEDY,
    forward_with_features,
    full_positions,
    masked,
    rows_of,
    without_nan,
)
from helpers.vlm_towers import Recorder, dense_block, same_segment

import cropr_kernels as cropr
from cropr_kernels.vlm.packed import blocks_of, find_tower, select_rows
from cropr_kernels.vlm.shortening import shorten

PACKED = sorted(vlm.PACKED)
RATIO = cropr.Schedule(ratio=0.8)


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_a_packed_tower_that_prunes_nothing_is_equal_to_the_bit(name):
    plain = vlm.make(name)
    inputs = vlm.inputs_for(name, images=(2, 1))
    model = cropr.prune_image_tokens(vlm.make(name), tower=cropr.Schedule(rate=0))
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(model.generate(**inputs, **GREEDY), plain.generate(**inputs, **GREEDY))


def pruned_written_anew(tower, recorder, queries, num_groups):
    """Return the rows (T, D) of a tower that prunes by masks, and the groups (G,) that are kept."""
    x = recorder.arguments[0][0]
    alive = torch.ones(len(x) // 4, dtype=torch.bool)
    image = torch.arange(len(num_groups)).repeat_interleave(torch.tensor(num_groups))
    counts = [RATIO.counts(count, len(recorder.arguments), 0) for count in num_groups]
    for layer, (block, (_, kwargs)) in enumerate(zip(blocks_of(tower), recorder.arguments)):
        rows = alive.repeat_interleave(4)
        allowed = same_segment(kwargs, len(x)) & rows & rows[:, None]
        x = dense_block(block, x, allowed, kwargs["position_embeddings"])
        if layer == len(recorder.arguments) - 1:
            break
        scores = x.unflatten(0, (-1, 4)).mean(1) @ queries[layer]
        for index, kept in enumerate(counts):
            groups = (alive & (image == index)).nonzero().squeeze(1)
            ranked = groups[scores[groups].argsort(descending=True)]
            alive[ranked[kept[layer] :]] = False
    return x, alive


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_survivors_of_a_packed_tower_equal_a_dense_one_written_anew(name):
    model = vlm.make(name)
    inputs = vlm.inputs_for(name, images=(2, 1))
    tower = find_tower(model)
    recorder = Recorder(tower)
    model(**inputs)
    recorder.remove()
    torch.manual_seed(3)
    queries = torch.randn(3, 32)
    num_groups = (inputs["image_grid_thw"].prod(1) // 4).tolist()
    expected, alive = pruned_written_anew(tower, recorder, queries, num_groups)
    assert 0 < alive.sum() < len(alive)

    cropr.prune_image_tokens(model, tower=RATIO)
    model.cropr_image_tokens.tower.queries = queries
    recorder = Recorder(tower)
    output = model.model.get_image_features(
        inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
    )
    rows = alive.repeat_interleave(4)
    torch.testing.assert_close(recorder.output[rows], expected[rows], rtol=2e-5, atol=2e-5)
    assert recorder.output[~rows].isnan().all()
    sizes = [len(kwargs["cu_seqlens"]) for _, kwargs in recorder.arguments]
    assert all(len(x) == kwargs["cu_seqlens"][-1] for x, kwargs in recorder.arguments)
    if name == "Qwen2.5-VL":
        assert sizes[0] != sizes[1]  # windows and whole images

    kept = [entry.isfinite().all(-1) for entry in output.pooler_output]
    counts = [cropr.num_image_tokens(model, count) for count in num_groups]
    assert [int(entry.sum()) for entry in kept] == counts
    for features in getattr(output, "deepstack_features", None) or ():
        assert rows_of(features)[torch.cat(kept)].isfinite().all()


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_a_packed_tower_hands_its_survivors_on(name):
    plain = vlm.make(name)
    inputs = vlm.inputs_for(name, images=(2, 1), texts=(3, 5))
    model = cropr.prune_image_tokens(vlm.make(name), tower=RATIO)
    shortened, columns = shorten(model, inputs, None, True)
    pruned = model.model.get_image_features(
        inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
    )
    # The features of survivors in their places, anything at the others, which are masked
    pruned.pooler_output = without_nan(pruned.pooler_output)
    if hasattr(pruned, "deepstack_features"):
        pruned.deepstack_features = without_nan(pruned.deepstack_features)
    expected = forward_with_features(
        plain,
        masked(plain, inputs, columns),
        pruned,
        position_ids=full_positions(plain, inputs),
    )
    logits = model(**inputs).logits
    present = shortened["attention_mask"].bool()
    expected = expected.gather(1, columns.index.clamp_min(0).unsqueeze(-1).expand(-1, -1, 60))
    torch.testing.assert_close(logits[present], expected[present], rtol=1e-5, atol=1e-5)

    other = copy.deepcopy(model)
    assert torch.equal(other(**inputs).logits, logits)
    model.cropr_image_tokens.keep = 2  # fewer than the tower leaves
    counts = [cropr.num_image_tokens(model, count) for count in (16, 8)]
    assert counts == [2, 2]
    assert model(**inputs).logits.isfinite().all()
    cropr.restore_image_tokens(model)
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(other(**inputs).logits, logits)


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "Qwen3-VL", "LLaVA"])
def test_gradients_go_through_a_pruned_tower(name):
    model = vlm.make(name)
    if name == "LLaVA":
        cropr.apply(model.model.vision_tower, rate=8, num_outputs=0)
    cropr.prune_image_tokens(model, tower=None if name == "LLaVA" else RATIO)
    inputs = vlm.inputs_for(name)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == vlm.IMAGE, -100)
    output = model(**inputs, labels=labels)
    with torch.no_grad():
        expected = model(**inputs, labels=labels)
    torch.testing.assert_close(output.logits, expected.logits)
    output.loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    tower = find_tower(model) or model.model.vision_tower
    assert any(w.grad is not None and w.grad.abs().sum() > 0 for w in tower.parameters())


@pytest.mark.parametrize("longest", [5, torch.tensor(5, dtype=torch.int32)])
def test_segments_of_kept_rows_have_their_own_ends_and_longest(longest):
    table = torch.arange(12.0)
    arguments = {
        "cu_seqlens": torch.tensor([0, 5, 8, 12], dtype=torch.int32),
        "position_embeddings": (table, -table),
        "max_seqlen": longest,
    }
    selected = select_rows(arguments, torch.tensor([1, 2, 3, 8, 11]))
    assert selected["cu_seqlens"].tolist() == [0, 3, 5]  # the second segment is gone
    assert selected["position_embeddings"][1].tolist() == [-1, -2, -3, -8, -11]
    assert type(selected["max_seqlen"]) is type(longest) and selected["max_seqlen"] == 3


def test_a_block_of_a_tower_without_those_before_it_is_refused():
    model = cropr.prune_image_tokens(vlm.make("Qwen2-VL"), tower=RATIO)
    with pytest.raises(RuntimeError, match="block 1 of a pruned tower ran without those before"):
        find_tower(model).blocks[1](torch.zeros(8, 32), cu_seqlens=torch.tensor([0, 8]))


@torch.no_grad()
def test_a_class_token_among_the_features_is_always_present():
    inputs = vlm.inputs_for("LLaVA")
    shape = {"input_ids": (vlm.IMAGE, 2), "attention_mask": (1, 2)}
    for name, (value, column) in shape.items():  # a placeholder more
        row = torch.full((2, 1), value)
        full = inputs[name]
        inputs[name] = torch.cat([full[:, :column], row, full[:, column:]], 1)
    model = vlm.make("LLaVA")
    model.config.vision_feature_select_strategy = "full"
    cropr.apply(model.model.vision_tower, rate=8, num_outputs=0)
    cropr.prune_image_tokens(model)
    _, columns = shorten(model, inputs, None, True)
    kept = columns.index[:, columns.index[0].eq(2).nonzero()[0, 0] :]
    assert (columns.index == 2).any(1).all() and kept.shape[1] < 65
    assert model(**inputs).logits.shape[1] == columns.index.shape[1]
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_blocks_that_run_again_in_backward_give_the_same_gradients_or_are_refused(use_reentrant):
    inputs = vlm.inputs_for("Qwen2-VL")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == vlm.IMAGE, -100)
    gradients = []
    for recomputes in (False, True):
        model = cropr.prune_image_tokens(vlm.make("Qwen2-VL"), tower=RATIO).train()
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(**inputs, labels=labels).loss.backward()
        gradients.append([weight.grad for weight in find_tower(model).blocks.parameters()])
    assert any(gradient.abs().sum() > 0 for gradient in gradients[0])
    torch.testing.assert_close(*gradients)
    merging = cropr.prune_image_tokens(vlm.make("Qwen2-VL"), tower=RATIO, merge=True).train()
    merging.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with pytest.raises(RuntimeError, match="whose groups merge cannot recompute its blocks"):
        merging(**inputs, labels=labels)


DENSE = {
    "LLaVA": ("LLaVA", {}),
    "LLaVA, merging": ("LLaVA", {"merge": True}),
    "LLaVA, fusion": ("LLaVA", {"llf": True}),
    "LLaVA-NeXT": ("LLaVA-NeXT", {}),
    "PaliGemma": ("PaliGemma", {}),
    "PaliGemma, merging": ("PaliGemma", {"merge": True}),
}


@pytest.mark.parametrize("case", DENSE)
@torch.no_grad()
def test_a_tower_pruned_by_apply_hands_its_tokens_on(case):
    name, options = DENSE[case]
    plain = vlm.make(name)
    inputs = vlm.inputs_for(name)
    model = vlm.make(name)
    tower = cropr.apply(model.model.vision_tower, rate=0, num_outputs=0, **options)
    cropr.prune_image_tokens(model)
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    cropr.set_rate(tower, 8)
    length = inputs["input_ids"].shape[1]
    logits = model(**inputs).logits
    if name != "LLaVA-NeXT":  # its tiles are cut and have ends of rows
        kept = cropr.num_image_tokens(model, 64)
        assert 40 < kept < 64 and logits.shape[1] == length - 64 + kept
    assert logits.shape[1] < length and logits.isfinite().all()
    answer = model.generate(**inputs, **GREEDY)
    assert answer.shape[1] == length + 4
    other = copy.deepcopy(model)
    cropr.restore_image_tokens(other)
    assert torch.equal(model(**inputs).logits, logits)

    # The kept rows are those that the same tower gives, all restored
    shortened, columns = shorten(model, inputs, None, True)
    rows = shortened["mm_encoder_outputs"]["image"].pooler_output
    model.cropr_image_tokens.keep = 0.999  # chooses among restored rows
    if options:
        restored = model.model.get_image_features(
            **{key: inputs[key] for key in ("pixel_values", "image_sizes") if key in inputs},
            return_dict=True,
        ).pooler_output
        places = (inputs["input_ids"] == vlm.IMAGE).nonzero()
        present = columns.index[0][shortened["input_ids"][0] == vlm.IMAGE]
        first = int(places[0, 1])
        torch.testing.assert_close(rows[0], restored[0][present - first], rtol=1e-5, atol=1e-5)


def test_refusals_of_towers_name_the_reason():
    with pytest.raises(TypeError, match=r"groups of patches, .* by cropr\.apply"):
        cropr.prune_image_tokens(vlm.make("LLaVA"), tower=RATIO)
    model = vlm.make("Qwen2-VL")
    find_tower(model).blocks = torch.nn.ModuleList(torch.nn.Identity() for _ in range(2))
    with pytest.raises(TypeError, match="has no blocks that take cu_seqlens"):
        cropr.prune_image_tokens(model, tower=RATIO)
    for part in (vlm.make("Qwen2-VL"), vlm.make("Qwen2-VL").model.visual):
        with pytest.raises(TypeError, match=r"packs images .* cropr\.prune_image_tokens"):
            cropr.apply(part, rate=4)
    model = vlm.make("InternVL")
    cropr.apply(model.model.vision_tower, rate=4, llf=True, num_outputs=0)
    cropr.prune_image_tokens(model)
    inputs = vlm.inputs_for("InternVL")
    with pytest.raises(ValueError, match="pools patches, which its tower prunes singly"):
        model(**inputs)
    model.cropr_image_tokens.keep = 0.5
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1] - 8
