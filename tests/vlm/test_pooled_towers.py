"""Towers whose projector pools patches: groups of patches are pruned or merged inside."""

import pytest
import torch
from helpers import vlm
from helpers.vlm import GREEDY, forward_with_features, full_positions, masked, without_nan

import cropr_kernels as cropr
from cropr_kernels.calibration import ranks
from cropr_kernels.models.blocks import SizeWeightedAttention
from cropr_kernels.utils.flops import flop_counter
from cropr_kernels.vlm.shortening import shorten

POOLED = ["InternVL", "Idefics3", "SmolVLM", "Gemma3"]
RATIO = cropr.Schedule(ratio=0.7)
SIDE = 4  # groups of 2 x 2 patches on a side
CELLS = torch.arange(64).view(SIDE, 2, SIDE, 2).transpose(1, 2).reshape(16, 4)


def blocks_of(model):
    base = model.model
    tower = getattr(base, "vision_tower", None) or base.vision_model
    return next(m for m in tower.modules() if isinstance(m, torch.nn.ModuleList))


class Recorder:
    """The tokens that enter the first block, and those that leave each block."""

    def __init__(self, model):
        self.blocks = blocks_of(model)
        self.tokens = []
        self.hooks = [self.blocks[0].register_forward_pre_hook(self.enter, with_kwargs=True)]
        self.hooks += [block.register_forward_hook(self.leave) for block in self.blocks]

    def enter(self, block, args, kwargs):
        self.tokens = [args[0] if args else kwargs["hidden_states"]]

    def leave(self, block, args, output):
        self.tokens.append(output)


def features(model, inputs):
    return model.model.get_image_features(inputs["pixel_values"], return_dict=True)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", POOLED)
@torch.no_grad()
def test_a_pooled_tower_that_prunes_nothing_is_equal_to_the_bit(name, merge):
    plain = vlm.make(name)
    inputs = vlm.inputs_for(name, images=(2, 1))
    model = cropr.prune_image_tokens(vlm.make(name), tower=cropr.Schedule(rate=0), merge=merge)
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(model.generate(**inputs, **GREEDY), plain.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", POOLED)
@torch.no_grad()
def test_survivors_of_a_pooled_tower_equal_one_image_at_a_time_written_anew(name, merge):
    model = vlm.make(name)
    inputs = vlm.inputs_for(name, images=(2, 1))
    recorder = Recorder(model)
    features(model, inputs)
    images = recorder.tokens[0].clone()
    torch.manual_seed(3)
    queries = torch.randn(2, 32)
    cropr.prune_image_tokens(model, tower=RATIO, merge=merge)
    tower = model.cropr_image_tokens.tower
    tower.queries = queries
    recorder = Recorder(model)
    output, sizes = tower.features(lambda: features(model, inputs))
    result = recorder.tokens[-1].clone()
    counts = RATIO.counts(16, 3, 0)
    cropr.restore_image_tokens(model)
    prefix = images.shape[1] - 64
    kept_groups = []
    for x, actual, handed_on in zip(images, result, sizes.split(16)):
        x = x.unsqueeze(0)
        groups = torch.arange(16)
        group_sizes = torch.ones(16)
        for layer, block in enumerate(recorder.blocks):
            if layer == 0:
                x = torch.cat([x[:, :prefix], x[:, prefix:][:, CELLS.flatten()]], 1)
            weights = torch.ones(1, prefix), group_sizes.repeat_interleave(4).unsqueeze(0)
            with SizeWeightedAttention(0.9 * torch.cat(weights, 1).log()):
                x = block(x, attention_mask=None) if name != "InternVL" else block(x)
            if layer == 2:
                break
            rows = x[0, prefix:].unflatten(0, (-1, 4))
            scores = rows.mean(1) @ queries[layer]
            count = counts[layer]
            if merge:
                colors = (groups // SIDE + groups % SIDE) % 2
                colors = (colors if layer == 0 else 1 - colors).to(torch.int8)
                adjusted = scores + 2 * scores.std(unbiased=False) * group_sizes.log()
                targets = min(count, max(3 * count - 2 * len(groups), -(-len(groups) // 2)))
                split = cropr.ops.select(adjusted[None], targets, 0, colors[None])
                scale = (0.25 * (adjusted - scores.mean()) / scores.std(unbiased=False)).exp()
                merged = cropr.ops.merge(
                    rows.flatten(1)[None], *split, group_sizes[None], count, cost_scale=scale[None]
                )
                rows, kept = merged.kept[0].unflatten(1, (4, -1)), merged.kept_idx[0]
                group_sizes = merged.kept_sizes[0]
            else:
                kept = scores.argsort(descending=True)[:count].sort().values
                rows, group_sizes = rows[kept], group_sizes[kept]
            groups = groups[kept]
            x = torch.cat([x[:, :prefix], rows.flatten(0, 1)[None]], 1)
        places = prefix + CELLS[groups].flatten()
        torch.testing.assert_close(actual[places], x[0, prefix:], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(actual[:prefix], x[0, :prefix], rtol=2e-5, atol=2e-5)
        assert actual.isnan().any(1).sum() == 64 - 4 * len(groups)
        assert torch.equal(handed_on.nonzero().squeeze(1), groups)
        assert torch.equal(handed_on[groups], group_sizes)
        kept_groups.append(groups)
    present = torch.cat([entry.reshape(-1, 32) for entry in output.pooler_output])
    for image, groups in zip(present.split(16), kept_groups):
        assert torch.equal(image.isfinite().all(1).nonzero().squeeze(1), groups)


@pytest.mark.parametrize("name", POOLED)
@torch.no_grad()
def test_a_pooled_tower_hands_its_survivors_on_and_saves_its_own_flops(name):
    plain = vlm.make(name)
    inputs = vlm.inputs_for(name, images=(2, 1), texts=(3, 5))
    model = cropr.prune_image_tokens(vlm.make(name), tower=RATIO)
    shortened, columns = shorten(model, inputs, None, True)
    kept = cropr.num_image_tokens(model, 16)
    placeholders = (shortened["input_ids"] == vlm.IMAGE).sum(1).tolist()
    assert placeholders == [2 * kept, kept] and kept == 9
    pruned = features(model, inputs)
    pruned.pooler_output = without_nan(pruned.pooler_output)
    expected = forward_with_features(
        plain,
        masked(plain, inputs, columns),
        pruned,
        position_ids=full_positions(plain, inputs),
    )
    present = shortened["attention_mask"].bool()
    expected = expected.gather(1, columns.index.clamp_min(0).unsqueeze(-1).expand(-1, -1, 60))
    logits = model(**inputs).logits
    torch.testing.assert_close(logits[present], expected[present], rtol=1e-5, atol=1e-5)
    assert model.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 4
    with flop_counter() as fewer:
        features(model, inputs)
    with flop_counter() as all_flops:
        features(plain, inputs)
    assert fewer.get_total_flops() < all_flops.get_total_flops()


@pytest.mark.parametrize("merge", [False, True])
def test_gradients_go_through_a_pooled_tower(merge):
    model = vlm.make("InternVL")
    cropr.prune_image_tokens(model, tower=RATIO, merge=merge)
    inputs = vlm.inputs_for("InternVL")
    output = model(**inputs, labels=inputs["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(output.logits, model(**inputs).logits)
    output.loss.backward()
    gradients = [weight.grad for weight in model.model.vision_tower.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@torch.no_grad()
def test_queries_of_a_pooled_tower_are_the_regression_to_what_later_blocks_look_at():
    model = vlm.make("Gemma3")
    inputs = vlm.inputs_for("Gemma3", images=(2, 1))
    recorder = Recorder(model)
    features(model, inputs)
    attended = []
    for block, x in zip(recorder.blocks, recorder.tokens):
        h = block.layer_norm1(x)
        q, k = (
            project(h).unflatten(2, (2, 16)).transpose(1, 2)
            for project in (block.self_attn.q_proj, block.self_attn.k_proj)
        )
        weights = (q @ k.mT / 4).softmax(-1).mean((1, 2))
        attended.append(weights[:, CELLS].mean(2))
    cropr.prune_image_tokens(model, tower=RATIO)
    cropr.calibrate_image_tokens(model, [inputs])
    for layer, query in enumerate(model.cropr_image_tokens.tower.queries):
        gram = torch.zeros(32, 32, dtype=torch.float64)
        moment = torch.zeros(32, dtype=torch.float64)
        target = torch.stack(attended[layer + 1 :]).mean(0)
        for x, values in zip(recorder.tokens[layer + 1].double(), target):
            centered = x[CELLS].mean(1) - x.mean(0)
            gram += centered.T @ centered
            moment += centered.T @ ranks(values[None])[0]
        expected = torch.linalg.solve(gram + 0.01 * gram.diagonal().mean() * torch.eye(32), moment)
        expected = (expected / expected.norm()).float()
        torch.testing.assert_close(query, expected, rtol=2e-3, atol=2e-3)


@torch.no_grad()
def test_padded_patches_stay_masked():
    model = vlm.make("SmolVLM")
    inputs = vlm.inputs_for("SmolVLM", images=(1,), texts=(3,))
    mask = torch.ones(1, 1, 32, 32, dtype=torch.long)
    mask[..., 24:] = 0
    inputs["pixel_attention_mask"] = mask
    cropr.prune_image_tokens(model, tower=RATIO)
    before = model(**inputs).logits
    inputs["pixel_values"][..., 24:] = 9.0
    tower = model.cropr_image_tokens.tower
    # Of equal scores the first groups stay, whatever the pixels are
    tower.queries = torch.zeros(2, 32)
    first = features_with_mask(model, inputs)
    inputs["pixel_values"][..., 24:] = -9.0
    second = features_with_mask(model, inputs)
    kept = first.isfinite().all(-1).view(4, 4)
    assert kept[:, :3].any() and before.isfinite().all()
    columns = torch.zeros(4, 4, dtype=torch.bool)
    columns[:, :3] = True
    valid = (kept & columns).flatten()
    torch.testing.assert_close(first[valid], second[valid])


def features_with_mask(model, inputs):
    output = model.model.get_image_features(
        inputs["pixel_values"], inputs["pixel_attention_mask"], return_dict=True
    )
    return torch.cat(list(output.pooler_output)).view(16, -1)


@torch.no_grad()
def test_a_tower_merged_by_apply_hands_on_survivors_by_their_sizes():
    model = vlm.make("LLaVA")
    inputs = vlm.inputs_for("LLaVA")
    cropr.apply(model.model.vision_tower, rate=8, num_outputs=0, merge=True)
    torch.manual_seed(2)
    query = torch.randn(32)
    cropr.prune_image_tokens(model, 10, query=query)
    output, sizes = model.cropr_image_tokens.dense.features(lambda: features(model, inputs))
    assert sizes.view(2, 64).sum(1).tolist() == [64, 64] and sizes.max() > 2
    _, columns = shorten(model, inputs, None, True)
    for row, part, index in zip(output.pooler_output, sizes.split(64), columns.index):
        survivors = part.nonzero().squeeze(1)
        scores = row[survivors] @ query
        scores = scores + 2 * scores.std(unbiased=False) * part[survivors].log()
        best = survivors[vlm.best_of_runs(scores, 10)]
        assert torch.equal(index[2:12] - 2, best)
    assert cropr.num_image_tokens(model, 64) == 10
    model.cropr_image_tokens.keep = 63
    assert cropr.num_image_tokens(model, 64) == model(**inputs).logits.shape[1] - 7


@torch.no_grad()
def test_a_dropping_tower_hands_on_a_choice_among_its_survivors():
    model = vlm.make("LLaVA")
    inputs = vlm.inputs_for("LLaVA")
    cropr.apply(model.model.vision_tower, rate=8, num_outputs=0)
    cropr.prune_image_tokens(model, 0.25)
    assert model(**inputs).logits.shape[1] == 16 + 7


@torch.no_grad()
def test_groups_of_merged_patches_count_the_sizes_of_their_own_survivors():
    model = vlm.make("InternVL")
    inputs = vlm.inputs_for("InternVL")
    cropr.apply(model.model.vision_tower, rate=8, num_outputs=0, merge=True)
    cropr.prune_image_tokens(model, 0.5)
    dense = model.cropr_image_tokens.dense
    _, sizes = dense.pooled_features(lambda: features(model, inputs), 2)
    expected = dense.marks.sizes[:, CELLS].sum(2).flatten()
    torch.testing.assert_close(sizes, expected)
    assert sizes.view(2, 16).sum(1).tolist() == [64, 64]
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1] - 8
    assert cropr.num_image_tokens(model, 16) == 8


def test_refusals_of_pooled_towers_name_the_reason():
    with pytest.raises(TypeError, match=r"tokens are groups of patches, .* by cropr\.apply"):
        cropr.prune_image_tokens(vlm.make("PaliGemma"), tower=RATIO)
    model = cropr.prune_image_tokens(vlm.make("InternVL"), tower=RATIO)
    with pytest.raises(ValueError, match=r"a square of them after at most one .* got 7 tokens"):
        model.cropr_image_tokens.tower._patches(7)
