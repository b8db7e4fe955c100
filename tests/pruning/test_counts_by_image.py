"""Each image keeps as many tokens as it needs: the engine on packed rows against blocks in plain
PyTorch, and who gets equal counts."""

import dataclasses
import math

import pytest
import torch
from helpers.models import MODELS, randomize, reference_vit, timm_eva
from torch.utils.flop_counter import FlopCounterMode

import cropr_kernels as cropr
from cropr_kernels.models.blocks import SizeWeightedAttention
from cropr_kernels.ops import reference
from cropr_kernels.ops.score_weights import cost_scales, size_adjusted_scores
from cropr_kernels.pruning.budget import (
    COST_WEIGHT,
    Thresholds,
    TotalBudget,
    num_candidates,
    quotas,
)
from cropr_kernels.pruning.costs import ImageFlops
from cropr_kernels.pruning.maps import counts_by_block
from cropr_kernels.pruning.merging import checkerboard, log_sizes
from cropr_kernels.pruning.model import modules_of, run
from cropr_kernels.pruning.state import PruningOptions

pytestmark = pytest.mark.usefixtures("two_threads")
RATE = 6


def photos(count=5, size=64, dtype=torch.float64, seed=0):
    """Return images of different detail: noise of several resolutions."""
    generator = torch.Generator().manual_seed(seed)
    images = [
        torch.nn.functional.interpolate(
            torch.randn(1, 3, 2 ** (1 + index % 5), 2 ** (1 + index % 5), generator=generator),
            size=(size, size),
        )
        for index in range(count)
    ]
    return torch.cat(images).to(dtype)


def calibrated(make, dtype=torch.float64, **options):
    model = cropr.apply(randomize(make()).eval().to(dtype), rate=RATE, merge=True, **options)
    return cropr.calibrate(model, photos(12, dtype=dtype, seed=1))


def merged_one_by_one(model, image):
    """Run one image through a reference ViT's blocks, and merge what costs at most the thresholds:
    its tokens by position before the norm, and how many each block saw."""
    modules = modules_of(model)
    budget = modules.thresholds.at(RATE)
    prefix, merge = modules.spec.num_prefix, modules.config.merge
    tower = cropr.remove(cropr.deploy(model, engine=False))
    queries = [modules.scorer(layer).query() for layer in range(modules.num_used)]
    captured = []
    handle = tower.blocks[0].register_forward_pre_hook(lambda block, args: captured.append(args[0]))
    tower(image)
    handle.remove()
    x = captured[0]
    sizes = x.new_ones(1, x.shape[1], dtype=torch.float32)
    colors = checkerboard(x, modules.spec.grid, prefix)
    positions = torch.arange(x.shape[1])[None]
    holder = positions.clone()
    counts, offsets = [], []
    for layer, block in enumerate(tower.blocks):
        if layer == len(tower.blocks) - modules.config.full_blocks:
            x = with_offsets(x, positions, offsets, modules.config.tracks_parents)
            sizes = x.new_ones(1, x.shape[1], dtype=torch.float32)
        counts.append(x.shape[1])
        with SizeWeightedAttention(log_sizes(sizes)):
            x = block(x)
        if layer >= len(queries):
            continue
        scores = reference.scores(x, queries[layer])
        adjusted = scores
        if layer:
            adjusted = size_adjusted_scores(scores, sizes, merge.size_weight, prefix)
        num_candidates_here = min(num_candidates(RATE), (x.shape[1] - prefix) // 2)
        priority = colors[layer % 2].gather(1, positions)
        targets, candidates = reference.select(
            adjusted, x.shape[1] - num_candidates_here, prefix, priority
        )
        scale = cost_scales(scores, adjusted, COST_WEIGHT, prefix) * sizes.sqrt()
        best, _ = reference.find_nearest(x, targets, candidates, prefix)
        cost = (1 - best).clamp_min(0) * scale.gather(1, candidates)
        cost = cost * cost.mean().sqrt()
        num_keep = x.shape[1] - int((cost <= budget.costs[layer]).sum())
        before = x
        x, kept, gone, sizes, dest = reference.merge(
            x, targets, candidates, sizes, num_keep, prefix, scale
        )
        holder = dest.gather(1, holder)
        parents = kept.gather(1, dest.gather(1, gone))
        change = reference.gather(before, gone)
        if modules.config.tracks_parents:
            change = change - reference.gather(x, dest.gather(1, gone))
        offsets.append((positions.gather(1, gone)[0], positions.gather(1, parents)[0], change[0]))
        positions = positions.gather(1, kept)
    return x if modules.config.llf else reference.gather(x, holder), counts


def with_offsets(x, positions, offsets, tracks_parents):
    """Return all tokens in order: one that merged as it was then, or, if it tracks its parent, the
    target and its offset from it then."""
    rows = dict(zip(positions[0].tolist(), x[0]))
    for gone, parents, change in reversed(offsets):
        for position, parent, offset in zip(gone.tolist(), parents.tolist(), change):
            rows[position] = rows[parent] + offset if tracks_parents else offset
    return torch.stack([rows[position] for position in sorted(rows)])[None]


@pytest.mark.parametrize(
    ("options", "llf"),
    [
        ({}, False),
        ({"reg_tokens": 3}, False),
        ({"qk_norm": True, "init_values": 0.5}, False),
        ({"reg_tokens": 3}, cropr.Fusion("track_parent", 2)),
        ({}, "as_pruned"),
    ],
)
def test_images_are_merged_as_one_by_one(options, llf):
    model = calibrated(lambda: reference_vit(global_pool="avg", depth=5, **options), llf=llf)
    images = photos()
    fast = cropr.deploy(model)
    [tokens], [state] = zip(
        run(fast, lambda: fast.forward_features(images), PruningOptions(engine=True))
    )
    seen = counts_by_block(state).tolist()
    for index, image in enumerate(images):
        expected, counts = merged_one_by_one(model, image[None])
        assert seen[index] == counts
        expected = fast.norm(expected)
        torch.testing.assert_close(tokens[index : index + 1], expected, rtol=1e-6, atol=1e-8)
    assert len({row[2] for row in seen}) > 1


FAMILIES = {**MODELS, "timm EVA-02, registers": lambda: timm_eva(num_reg_tokens=3)}


@pytest.mark.each_choice
@pytest.mark.parametrize("llf", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_is_independent_of_those_beside_it(name, llf):
    fast = cropr.deploy(calibrated(FAMILIES[name], llf=llf))
    assert fast.cropr.has_counts_by_image
    images = photos()
    together = fast(images)
    for index in range(len(images)):
        torch.testing.assert_close(fast(images[index : index + 1])[0], together[index])


def test_calibration_images_lose_the_quota_on_average():
    model = calibrated(reference_vit)
    fast = cropr.deploy(model)
    budget = TotalBudget(RATE, [2, 4, 6.5])
    images = photos(12, seed=1)
    _, state = run(fast, lambda: fast(images), PruningOptions(engine=True, budget=budget))
    counts = counts_by_block(state)
    assert (-counts.diff(dim=1).sum(0)).tolist() == [24, 48, 78]
    assert (counts.sum(1) != counts.sum(1)[0]).any()


@pytest.mark.parametrize(("rate", "modules"), [(4, 11), (8, 11), (15, 11), (6, 3), (20, 3)])
def test_quotas_take_the_flops_of_the_constant_rate(rate, modules):
    counts = [197 - rate * (module + 1) for module in range(modules)]
    merged = quotas(rate, counts, 197, linear=400)
    remaining = [197 - sum(merged[: module + 1]) for module in range(modules)]

    def flops(counts):
        return sum(400 * count + count**2 for count in counts)

    assert flops(remaining) == pytest.approx(flops(counts), rel=1e-6)
    assert (merged[0] < merged[-1]) == (modules > 3 and rate <= 8)


def test_flops_by_image_add_up_to_those_counted():
    fast = cropr.deploy(calibrated(lambda: reference_vit(embed_dim=128)))
    images = photos()
    flops = ImageFlops(fast, images[:1])
    with FlopCounterMode(display=False) as counter:
        _, state = run(fast, lambda: fast(images), PruningOptions(engine=True))
    assert flops(state).sum() == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert flops(state).max() > 1.01 * flops(state).min()


def test_equal_counts_where_own_ones_are_not_known():
    model = calibrated(lambda: reference_vit(no_embed_class=True))
    images = photos()

    def counts_of(pruned, *args, images=images, **kwargs):
        fast = cropr.deploy(pruned, **kwargs)
        _, state = run(fast, lambda: fast(images), PruningOptions(engine=True))
        return state

    assert counts_of(model).record is not None
    assert counts_of(model, engine=False).record is None
    modules_of(model).config = dataclasses.replace(
        modules_of(model).config, schedule=cropr.Schedule(keep=[50, 40, 30])
    )
    assert counts_of(model).record is None  # a list of counts
    cropr.set_rate(model, RATE)
    thresholds = modules_of(model).thresholds
    modules_of(model).thresholds = dataclasses.replace(thresholds, num_tokens=17)
    assert counts_of(model).record is None  # images of another size
    modules_of(model).thresholds = thresholds
    protect = torch.zeros(5, 8, 8, dtype=torch.bool)
    fast = cropr.deploy(model)
    options = PruningOptions(engine=True, protect=protect)
    assert run(fast, lambda: fast(images), options)[1].record is None
    cropr.set_rate(model, 20)
    assert counts_of(model).record is None  # above the highest rate that was calibrated


def test_thresholds_take_the_flops_of_their_rates():
    model = calibrated(reference_vit)
    images = photos(12, seed=1)
    flops = ImageFlops(cropr.deploy(model), images[:1])
    for rate in modules_of(model).thresholds.rates:
        fast = cropr.deploy(cropr.set_rate(model, rate))
        by_image, equal = (
            run(fast, lambda fast=fast: fast(images), PruningOptions(engine=True, **options))[1]
            for options in ({}, {"equal_counts": True})
        )
        assert by_image.record is not None and equal.record is None
        expected = float(flops(equal).mean())
        assert float(flops(by_image).mean()) == pytest.approx(expected, rel=0.01), rate


def test_training_forgets_thresholds():
    model = calibrated(reference_vit)
    model.train()(photos())
    assert modules_of(model).thresholds is None


def test_files_keep_thresholds(tmp_path):
    model = calibrated(reference_vit, dtype=torch.float32)
    thresholds = modules_of(model).thresholds
    images = photos(dtype=torch.float32)
    expected = cropr.deploy(model)(images)
    cropr.save_queries(model, tmp_path / "queries.safetensors")
    weights = cropr.remove(cropr.deploy(model)).state_dict()
    other = reference_vit()
    other.load_state_dict(weights)
    cropr.apply(other.eval(), rate=RATE, merge=True)
    cropr.load_queries(other, tmp_path / "queries.safetensors")
    assert modules_of(other).thresholds == thresholds
    torch.testing.assert_close(cropr.deploy(other)(images), expected)
    cropr.save(model, tmp_path / "folder")
    loaded = cropr.load(tmp_path / "folder")
    assert modules_of(loaded).thresholds == thresholds
    torch.testing.assert_close(cropr.deploy(loaded)(images), expected)


def test_queries_of_dropping_bring_no_thresholds_for_merging(tmp_path):
    cropr.save_queries(calibrated(reference_vit, torch.float32), tmp_path / "q.safetensors")
    model = cropr.apply(reference_vit(), rate=RATE)
    assert modules_of(cropr.load_queries(model, tmp_path / "q.safetensors")).thresholds is None


def test_thresholds_of_fewer_modules_leave_equal_counts():
    model = calibrated(reference_vit, llf=cropr.Fusion(blocks=2), num_outputs=0)
    thresholds = modules_of(model).thresholds
    torch.manual_seed(0)
    other = calibrated(reference_vit, num_outputs=0)
    assert thresholds.num_modules < modules_of(other).thresholds.num_modules
    fast = cropr.deploy(other)
    images = photos()
    modules_of(fast).thresholds = thresholds
    actual = fast(images)
    modules_of(fast).thresholds = None
    assert torch.equal(actual, fast(images))


def test_thresholds_between_two_rates_are_their_geometric_mean():
    thresholds = Thresholds(65, (4.0, 8.0), ((0.1, 0.2), (0.3, 0.6)))
    assert thresholds.at(6).costs == pytest.approx((0.03**0.5, 0.12**0.5))
    assert thresholds.at(2).costs == pytest.approx((0.05, 0.1))
    assert thresholds.at(8).costs == pytest.approx((0.3, 0.6))
    assert thresholds.at(9) is None


def test_thresholds_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="rates must ascend from above 0, got"):
        Thresholds(65, (4.0, 4.0), ((0.1,), (0.2,)))
    with pytest.raises(ValueError, match="one row a rate of equal length, got 2 rows"):
        Thresholds(65, (4.0, 8.0), ((0.1,), (0.2, 0.3)))


def test_maps_show_what_the_engine_merges():
    model = calibrated(lambda: reference_vit(global_pool="avg"))
    images = photos()
    fast = cropr.deploy(model)
    _, state = run(fast, lambda: fast(images), PruningOptions(engine=True))
    remaining = counts_by_block(state)[:, -1] - 1
    blocks = cropr.pruning_map(fast, images)
    assert torch.equal((blocks == 4).flatten(1).sum(1), remaining)
    merged = cropr.merge_map(fast, images)
    assert torch.equal(merged.flatten(1).max(1).values + 1, remaining)


def test_layers_see_few_numbers_of_rows():
    """A library prepares a kernel for each number of rows that it has not seen."""
    model = cropr.deploy(calibrated(reference_vit, torch.float32))
    seen, counts = [], []
    for block in model.cropr.spec.blocks[1:]:
        block.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    for num_images in (1, 3, 8, 40):
        images = photos(num_images, dtype=torch.float32)
        _, state = run(model, lambda images=images: model(images), PruningOptions(engine=True))
        counts += counts_by_block(state)[:, 1:].sum(0).tolist()
    assert len(seen) == len(counts) and seen != counts
    for rows, count in zip(seen, counts):
        multiple = max(4, 2 ** int(math.log2(count / 64)))
        assert rows % multiple == 0 and count <= rows < count + multiple
