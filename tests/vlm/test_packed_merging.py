"""Groups that merge inside towers that pack their images."""

import copy
import math

import pytest
import torch
from helpers import vlm
from helpers.vlm import GREEDY
from helpers.vlm_towers import Recorder, dense_block, same_segment

import cropr_kernels as cropr
from cropr_kernels.vlm.choice import choose
from cropr_kernels.vlm.packed import blocks_of, find_tower
from cropr_kernels.vlm.shortening import shorten

PACKED = sorted(vlm.PACKED)
RATIO = cropr.Schedule(ratio=0.8)


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_a_tower_that_merges_nothing_is_equal_to_the_bit(name):
    plain = vlm.make(name)
    inputs = vlm.inputs_for(name, images=(2, 1))
    model = cropr.prune_image_tokens(vlm.make(name), tower=cropr.Schedule(rate=0), merge=True)
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(model.generate(**inputs, **GREEDY), plain.generate(**inputs, **GREEDY))


def colors_of(tower, inputs, recorder):
    """Return the color of each group of all images, in the order of the first block's rows."""
    colors = []
    for frames, height, width in (inputs["image_grid_thw"]).tolist():
        for _ in range(frames):
            colors += [(i + j) % 2 for i in range(height // 2) for j in range(width // 2)]
    embedded = tower.patch_embed(inputs["pixel_values"])
    same = (recorder.arguments[0][0][:, None] == embedded[None]).all(2)
    if not same.any():  # positions are added: the tower does not permute its rows
        return torch.tensor(colors)
    order = same.int().argmax(1)[::4] // 4
    return torch.tensor(colors)[order]


def merge_one_image(vectors, scores, sizes, active, count, color):
    """Merge the active groups of vectors (G, S D) until `count` are left, in place."""
    spread = scores[active].std(unbiased=False)
    adjusted = scores + 2.0 * spread * sizes.log()
    half = math.ceil(len(active) / 2)
    num_targets = min(count, max(len(active) - 3 * (len(active) - count), half))
    ranked = sorted(active, key=lambda g: (-int(color[g]), -float(adjusted[g]), g))
    targets, candidates = ranked[:num_targets], ranked[num_targets:]
    costs = []
    for group in candidates:
        cosine = torch.cosine_similarity(vectors[group], vectors[targets], dim=1)
        factor = (0.25 * (adjusted[group] - scores[active].mean()) / spread).exp()
        costs.append(
            (float((1 - cosine.max()).clamp_min(0) * factor), group, targets[cosine.argmax()])
        )
    merges = sorted(costs)[: len(active) - count]
    norms = vectors.norm(dim=1)
    sums = vectors * sizes[:, None]
    for _, group, target in merges:
        sums[target] += sums[group]
        sizes[target] += sizes[group]
    for target in {target for _, _, target in merges}:
        mean = sums[target] / sizes[target]
        vectors[target] = mean * norms[target] / mean.norm()
    gone = {group for _, group, _ in merges}
    return [group for group in active if group not in gone]


def merged_written_anew(tower, recorder, queries, num_groups, colors):
    """Return the rows (T, D) and sizes (G,) of a tower that merges by masks; 0: merged away."""
    x = recorder.arguments[0][0]
    sizes = torch.ones(len(x) // 4)
    ends = torch.tensor(num_groups).cumsum(0).tolist()
    images = [list(range(end - count, end)) for end, count in zip(ends, num_groups)]
    counts = [RATIO.counts(count, len(recorder.arguments), 0) for count in num_groups]
    for layer, (block, (_, kwargs)) in enumerate(zip(blocks_of(tower), recorder.arguments)):
        alive = torch.zeros(len(sizes), dtype=torch.bool)
        for active in images:
            alive[active] = True
        rows = alive.repeat_interleave(4)
        allowed = same_segment(kwargs, len(x)) & rows & rows[:, None]
        logs = 0.9 * sizes.log().repeat_interleave(4)
        x = dense_block(block, x, allowed, kwargs["position_embeddings"], logs)
        if layer == len(recorder.arguments) - 1:
            return x, sizes * alive
        vectors = x.reshape(len(sizes), -1)
        scores = x.unflatten(0, (-1, 4)).mean(1) @ queries[layer]
        color = colors if layer % 2 == 0 else 1 - colors
        images = [
            merge_one_image(vectors, scores, sizes, active, kept[layer], color)
            for active, kept in zip(images, counts)
        ]
        x = vectors.reshape(x.shape)


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_survivors_that_merged_equal_a_dense_tower_written_anew(name):
    model = vlm.make(name)
    inputs = vlm.inputs_for(name, images=(2, 1))
    tower = find_tower(model)
    recorder = Recorder(tower)
    model(**inputs)
    recorder.remove()
    torch.manual_seed(3)
    queries = torch.randn(3, 32)
    num_groups = (inputs["image_grid_thw"].prod(1) // 4).tolist()
    colors = colors_of(tower, inputs, recorder)
    expected, sizes = merged_written_anew(tower, recorder, queries, num_groups, colors)
    assert sizes.sum() == len(sizes) and sizes.max() > 2

    cropr.prune_image_tokens(model, tower=RATIO, merge=True)
    model.cropr_image_tokens.tower.queries = queries
    recorder = Recorder(tower)
    output, handed_on = model.cropr_image_tokens.tower.features(
        lambda: model.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
        )
    )
    rows = (sizes > 0).repeat_interleave(4)
    torch.testing.assert_close(recorder.output[rows], expected[rows], rtol=5e-5, atol=5e-5)
    assert recorder.output[~rows].isnan().all()
    finite = torch.cat([entry.isfinite().all(-1) for entry in output.pooler_output])
    assert torch.equal(finite, handed_on > 0)
    if name != "Qwen2.5-VL":  # its windows are not in the order of rows and columns
        assert torch.equal(handed_on, sizes)
    assert torch.equal(handed_on.sort().values, sizes.sort().values)


@torch.no_grad()
def test_merged_groups_are_chosen_by_their_sizes_behind_the_tower():
    rows = torch.tensor([[3.0], [2.0], [1.0], [0.0]])
    query = torch.ones(1)
    assert choose(rows, 2, query).tolist() == [0, 2]
    sizes = torch.tensor([1.0, 1.0, 1.0, 9.0])
    assert choose(rows, 2, query, torch.ones(4)).tolist() == [0, 2]
    assert choose(rows, 2, query, sizes).tolist() == [0, 3]  # 0 + 2 * 1.118 * log(9) = 4.9

    model = vlm.make("Qwen3-VL")
    inputs = vlm.inputs_for("Qwen3-VL", images=(2,), texts=(3,))
    cropr.prune_image_tokens(model, tower=RATIO, merge=True)
    cropr.calibrate_image_tokens(model, [inputs])
    tokens = model.cropr_image_tokens
    output, sizes = tokens.tower.features(
        lambda: model.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
        )
    )
    tokens.keep = 4
    _, columns = shorten(model, inputs, None, True)
    places = (inputs["input_ids"][0] == vlm.IMAGE).nonzero().squeeze(1)
    start = 0
    for rows in output.pooler_output:
        part = sizes[start : start + len(rows)]
        present = part.nonzero().squeeze(1)
        scores = rows[present] @ tokens.query
        scores = scores + 2.0 * scores.std(unbiased=False) * part[present].log()
        best = present[vlm.best_of_runs(scores, 4)]
        chosen = places[start : start + len(rows)]
        kept = torch.isin(chosen, columns.index[0]).nonzero().squeeze(1)
        assert torch.equal(kept, best)
        start += len(rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_copies_and_eager_attention_go_through_merging(attention):
    model = vlm.make("Qwen2.5-VL")
    cropr.prune_image_tokens(model, tower=RATIO, merge=True)
    inputs = vlm.inputs_for("Qwen2.5-VL")
    cropr.calibrate_image_tokens(model, [inputs])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == vlm.IMAGE, -100)
    with torch.no_grad():
        expected = model(**inputs, labels=labels)
    model.set_attn_implementation({"vision_config": attention})
    output = copy.deepcopy(model)(**inputs, labels=labels)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-4)
    output = model(**inputs, labels=labels)
    output.loss.backward()
    gradients = [weight.grad for weight in find_tower(model).parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@torch.no_grad()
def test_merging_refuses_attention_that_cannot_weigh_sizes():
    with pytest.raises(ValueError, match="merge is of tower, got merge=True and tower=None"):
        cropr.prune_image_tokens(vlm.make("Qwen2-VL"), 0.5, merge=True)
    model = vlm.make("Qwen2-VL")
    inputs = vlm.inputs_for("Qwen2-VL")
    cropr.prune_image_tokens(model, tower=RATIO, merge=True)

    def other(module, query, key, value, attention_mask, scaling, **kwargs):
        probabilities = torch.exp((query @ key.mT) * scaling)
        heads = probabilities / probabilities.sum(-1, keepdim=True) @ value
        return heads.transpose(1, 2), None

    vlm.transformers().AttentionInterface.register("without_softmax", other)
    model.set_attn_implementation({"vision_config": "without_softmax"})
    with pytest.raises(ValueError, match=r"once for each of 2 segments, got 0 calls; .*\"sdpa\""):
        model(**inputs)
    model.set_attn_implementation({"vision_config": "sdpa"})
    assert model(**inputs).logits.isfinite().all()
