"""Protected patches and padding: model(images, protect=..., padding=...), against slow versions of
both."""

import copy

import pytest
import torch
from helpers.models import MODELS, embed, randomize, reference_vit, timm_eva, timm_vit

import cropr_kernels as cropr
from cropr_kernels.pruning.masks import level_padding, make_masks
from cropr_kernels.pruning.windows import Windows

GRID, PATCH, SIZES = (8, 8), (8, 8), [(64, 64), (40, 61), (17, 24)]
PADDED = [name for name in MODELS if "any size" not in name]


def prepared(name, **options):
    model = randomize(MODELS[name]()).double().eval()
    return cropr.apply(model, num_outputs=0, **options)


def batch_of_sizes():
    return cropr.pad_images(
        [torch.randn(3, *size, dtype=torch.float64) for size in SIZES], PATCH, (64, 64)
    )


@torch.no_grad()
def alone(model, images, padding):
    """Return the logits of each image alone, its padding cut out before the first block."""
    modules, prefix = model.cropr, model.num_prefix_tokens
    model = cropr.remove(copy.deepcopy(model))
    embedded, table = embed(model, images)
    outputs = []
    for x, absent in zip(embedded, padding.flatten(1)):
        here = torch.cat([torch.arange(prefix), prefix + (~absent).nonzero().flatten()])
        x, pruned = x[here], []
        counts = modules.config.counts(embedded.shape[1], len(model.blocks), prefix)
        for layer, block in enumerate(model.blocks):
            if modules.config.llf and layer == len(model.blocks) - 1 and pruned:
                rows, positions = (
                    torch.cat([x, *(t for t, _ in pruned)]),
                    torch.cat([here, *(p for _, p in pruned)]),
                )
                x, here = rows[positions.argsort()], positions.sort().values
            kwargs = {} if table is None else {"rope": table[here[prefix:] - prefix]}
            x = block(x[None], **kwargs)[0]
            if layer < len(modules):
                scores = x @ modules[layer].query().double()
                scores[:prefix] = float("inf")
                order = scores.argsort(descending=True, stable=True)
                stay, leave = (
                    order[: counts[layer]].sort().values,
                    order[counts[layer] :].sort().values,
                )
                pruned.append((x[leave], here[leave]))
                x, here = x[stay], here[stay]
        outputs.append(model.forward_head(model.norm(x[None])))
    return torch.cat(outputs)


@pytest.mark.parametrize("llf", [False, True])
@pytest.mark.parametrize("name", PADDED)
def test_padding_changes_nothing_for_the_patches_that_are_there(name, llf):
    model = prepared(name, rate=9, llf=llf)
    images, padding = batch_of_sizes()
    expected = alone(model, images, padding)
    fast = cropr.deploy(model)
    assert fast.cropr.engine is not None
    with torch.no_grad():
        torch.testing.assert_close(model(images, padding=padding), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fast(images, padding=padding), expected, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(model(images), expected, rtol=1e-3)


def test_the_content_of_padding_changes_nothing():
    model = cropr.deploy(prepared("reference", rate=9))
    images, padding = batch_of_sizes()
    other = torch.where(
        padding.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None], 1e3, images
    )
    # Padding is never selected by score, and its attention weight is zero.
    torch.testing.assert_close(
        model(other, padding=padding), model(images, padding=padding), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padding_weighs_nothing_in_sixteen_bits_either(dtype):
    model = cropr.deploy(prepared("timm EVA-02", rate=0)).to(dtype)
    images, padding = batch_of_sizes()
    images = images.to(dtype)
    got = model(images, padding=padding)
    assert got.isfinite().all()
    other = torch.where(
        padding.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None], 3.0, images
    ).to(dtype)
    torch.testing.assert_close(model(other, padding=padding), got, rtol=2e-2, atol=2e-2)


def test_padding_is_pruned_first_and_protected_patches_last():
    model = cropr.deploy(prepared("timm ViT", rate=9))
    images, padding = batch_of_sizes()
    protect = torch.zeros(3, *GRID, dtype=torch.bool)
    protect[:, 0, :3] = protect[0, 5:7, 4:8] = True
    left = cropr.pruning_map(model, images, protect=protect, padding=padding)
    assert (left[protect] == 4).all()
    for image, absent in zip(left, padding):
        if absent.any() and not (image[~absent] == 4).all():
            assert image[absent].max() <= image[~absent].min()
    without = cropr.pruning_map(model, images)
    assert (without[protect] < 4).any() and (left == 4).sum() == (without == 4).sum()


@pytest.mark.each_choice
@pytest.mark.parametrize("name", [*PADDED, "timm ViT, any size"])
@pytest.mark.parametrize("merge", [False, True])
def test_protected_patches_stay_and_the_engine_agrees(name, merge):
    model = prepared(name, rate=9, merge=merge)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    protect = cropr.protect_boxes(
        [torch.tensor([[3.0, 3.0, 20.0, 30.0]]), torch.zeros(0, 4)], GRID, PATCH
    )
    assert protect[0].sum() == 3 * 4 and not protect[1].any()
    assert (cropr.pruning_map(model, images, protect=protect)[protect] == 4).all()
    with torch.no_grad():
        expected = model(images, protect=protect)
        torch.testing.assert_close(
            cropr.deploy(model)(images, protect=protect), expected, rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(expected[1], model(images)[1], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(expected[0], model(images)[0])
    if merge:
        rows = cropr.merge_map(model, images, protect=protect)[0][protect[0]]
        assert len(rows.unique()) == len(rows)  # none went into another


def test_more_protected_than_may_stay_are_ranked_by_their_scores():
    model = prepared("reference", keep=[20, 20, 20])
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    protect = torch.rand(1, *GRID) > 0.3
    left = cropr.pruning_map(model, images, protect=protect)
    stays = left == 4
    assert stays.sum() == 19 and protect[stays].all()
    with torch.no_grad():
        plain = cropr.remove(copy.deepcopy(model))
        x = plain.blocks[0](plain.embed(images)[0])
    scores = (x @ model.cropr[0].query().double())[0, 1:].view(1, *GRID)
    assert scores[stays].min() > scores[protect & ~stays].max()


@pytest.mark.parametrize("options", [{}, {"num_queries": 3}])
def test_auxiliary_predictions_do_not_see_padding(options):
    model = cropr.apply(randomize(reference_vit()), rate=9, **options).double().train()
    images, padding = batch_of_sizes()
    output, aux = model(images, padding=padding)
    embedded = model.embed(images)[0]
    here = ~torch.cat([torch.zeros(1, dtype=torch.bool), padding[2].flatten()])
    x = cropr.remove(copy.deepcopy(model)).blocks[0](embedded[2:, here])
    prediction, _ = model.cropr[0].predict(x)
    torch.testing.assert_close(aux[0][2:], prediction)
    target = torch.tensor([1, 2, 3])
    criterion = torch.nn.functional.cross_entropy
    predictions = [p.mean(1) if p.ndim == 3 else p for p in aux]
    cropr.loss(criterion, output, predictions, target).backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for p in model.cropr.parameters()
        if p.requires_grad
    )


def test_masks_work_under_checkpointing_compilation_and_windows():
    images, padding = batch_of_sizes()
    protect = torch.zeros(3, *GRID, dtype=torch.bool)
    protect[:, :2, :2] = True
    model = prepared("timm ViT", rate=9)
    fast, masks = cropr.deploy(model), {"protect": protect, "padding": padding}
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(images, **masks), fast(images, **masks), rtol=1e-9, atol=1e-9
        )
    model.train().set_grad_checkpointing()
    recomputed = model(images, **masks)[0]
    model.set_grad_checkpointing(False)
    torch.testing.assert_close(recomputed, model(images, **masks)[0])
    windowed = prepared("timm EVA-02", rate=3, llf=True, windows=Windows(4, (1, 3)))
    left = cropr.pruning_map(windowed, images, protect=protect)
    assert (left[protect] == 4).all()
    with torch.no_grad():
        assert not torch.equal(
            cropr.features(windowed, images, protect=protect)[0], windowed.forward_features(images)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("name", PADDED)
def test_masks_on_cuda_give_the_cpu_result_replayed_too(name):
    model = prepared(name, rate=9, llf=True)
    images, padding = batch_of_sizes()
    protect = torch.rand(3, *GRID) > 0.8
    with torch.no_grad():
        expected = model(images, protect=protect, padding=padding)
        fast = cropr.deploy(model, cuda_graphs=2).cuda()
        moved, masks = images.cuda(), {"protect": protect.cuda(), "padding": padding.cuda()}
        for _ in range(2):
            torch.testing.assert_close(fast(moved, **masks).cpu(), expected, rtol=1e-6, atol=1e-6)
        replayed = fast(moved, padding=masks["padding"]).cpu()
        torch.testing.assert_close(replayed, model(images, padding=padding), rtol=1e-6, atol=1e-6)


def test_level_padding_makes_averages_those_of_the_patches():
    x, padding = torch.randn(2, 6, 4), torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 0, 0]]).bool()
    got = level_padding(x, padding, 1)[:, 1:].mean(1)
    torch.testing.assert_close(got[0], x[0, 1:3].mean(0))
    torch.testing.assert_close(got[1], x[1, [1, 3, 4, 5]].mean(0))


def test_pad_images_marks_patches_without_pixels():
    batch, padding = cropr.pad_images([torch.ones(3, 20, 33), torch.ones(3, 16, 16)], (16, 16))
    assert batch.shape == (2, 3, 32, 48) and batch.sum() == 3 * (20 * 33 + 16 * 16)
    assert padding.tolist() == [[[False] * 3] * 2, [[False, True, True], [True, True, True]]]


def test_masks_that_do_not_fit_the_images_or_the_model_raise():
    model = prepared("reference", rate=9)
    images, padding = batch_of_sizes()
    for name in ("protect", "padding"):
        for bad in (padding.float(), padding[:2], padding[:, :3], padding.flatten(1)):
            with pytest.raises(
                ValueError,
                match=f"cropr: {name} must be bool of shape .* B = 3 and 64 patches, got",
            ):
                model(images, **{name: bad})
    with pytest.raises(ValueError, match="padding is not supported with merge=True"):
        prepared("reference", rate=9, merge=True)(images, padding=padding)
    windowed = prepared("timm EVA-02", rate=3, llf=True, windows=Windows(4))
    with pytest.raises(ValueError, match="padding is not supported with window attention"):
        cropr.features(windowed, images, padding=padding)
    pooling = (
        cropr.apply(timm_vit(class_token=False, global_pool="map"), rate=9, num_outputs=0)
        .double()
        .eval()
    )
    with pytest.raises(
        ValueError, match="padding needs a head that takes the class token or averages"
    ):
        pooling(images, padding=padding)
    mute = timm_eva()
    mute.blocks[1].attn.forward = lambda x, **kwargs: x
    with pytest.raises(
        ValueError, match=r"merging and padding need attention by scaled_.*, and EvaBlock has none"
    ):
        cropr.apply(mute, rate=9, num_outputs=0).double()(images, padding=padding)
    with pytest.raises(
        ValueError, match=r"protect_boxes: boxes must have shape \(n, 4\), got \(4,\)"
    ):
        cropr.protect_boxes([torch.zeros(4)], GRID)
    with pytest.raises(ValueError, match="pad_images: needs at least one image"):
        cropr.pad_images([])
    with pytest.raises(
        ValueError, match=r"pad_images: image 1 must fit into \(3, 16, 16\), got \(3, 20, 8\)"
    ):
        cropr.pad_images([torch.ones(3, 8, 8), torch.ones(3, 20, 8)], size=(16, 16))
    assert make_masks(None, None, 1, 4, 1) is None
