"""Segmentation without Last Layer Fusion: every way to a full map against a slow and obvious
one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.models import randomize, reference_vit
from helpers.tasks import BACKBONES, CLASSES, check_a_step_and_its_maps

import cropr_kernels as cropr
from benchmarks.baselines.fusions import OTHER_FUSIONS, Confident, FusedSegmenter
from benchmarks.baselines.registry import FUSIONS

SCHEDULES = {
    "a rate": {"rate": 9},
    "not after every block": {"keep": [65, 40, 40]},
    "nothing": {"rate": 0},
}


def segmenter(fusion, name="reference", **schedule):
    model = BACKBONES[name]()
    cropr.apply(model, **(schedule or {"rate": 9}), num_queries=64, num_outputs=CLASSES)
    return randomize(FusedSegmenter(model, CLASSES, grid=(8, 8), fusion=fusion)).train()


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("fusion", OTHER_FUSIONS)
def test_every_fusion_trains_every_parameter_and_runs_at_other_sizes(name, fusion):
    task = segmenter(fusion, name)
    check_a_step_and_its_maps(task)
    with torch.no_grad():
        if not fusion.startswith("cross_attn"):
            assert task(torch.randn(1, 3, 64, 96)).shape == (1, CLASSES, 64, 96)


@pytest.mark.parametrize("fusion", [fusion for fusion in OTHER_FUSIONS if fusion != "dtop"])
def test_the_auxiliary_loss_stays_out_of_the_backbone(fusion):
    task = segmenter(fusion)
    task(torch.randn(2, 3, 64, 64), torch.randint(0, CLASSES, (2, 64, 64)))["aux"].backward()
    reached = [name for name, p in task.named_parameters() if p.grad is not None and p.grad.any()]
    assert reached and all(".cropr." in name for name in reached)


def tokens_of(task, images):
    """Return the last row of every token of one image, the kept tokens, and the layer that pruned
    each other one."""
    modules, backbone = task.backbone.cropr, cropr.remove(copy.deepcopy(task.backbone))
    x, _ = backbone.embed(images)
    active, pruned = list(range(x.shape[1])), {}
    counts = modules.config.counts(x.shape[1], len(backbone.blocks), 1)
    rows = dict(enumerate(x[0]))
    for layer, block in enumerate(backbone.blocks):
        out = block(torch.stack([rows[p] for p in active])[None])[0]
        rows |= dict(zip(active, out))
        if layer < len(counts):
            kept = modules[layer](out[None], counts[layer], 1).kept_idx[0].tolist()
            pruned |= dict.fromkeys((p for i, p in enumerate(active) if i not in kept), layer)
            active = [active[i] for i in kept]
    return rows, active, pruned


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("fusion", OTHER_FUSIONS)
@torch.no_grad()
def test_fusions_equal_a_slow_implementation(fusion, schedule):
    task = segmenter(fusion, **SCHEDULES[schedule]).eval()
    images = torch.randn(1, 3, 64, 64)
    rows, kept, pruned = tokens_of(task, images)
    norm = task.backbone.norm
    stayed = torch.stack([rows[p] for p in kept])[None]
    everything = torch.stack([rows[p] for p in range(65)])[None]
    if fusion == "dtop":
        expected = torch.stack(
            [
                task.backbone.cropr[pruned[p]].classify(rows[p])
                if p in pruned
                else task.head(norm(rows[p]))
                for p in range(1, 65)
            ]
        )[None]
    else:
        tokens = {
            "concat": lambda: norm(everything)[:, 1:],
            "mhsa_concat": lambda: norm(task.fuse.block(everything))[:, 1:],
            "cross_attn": lambda: task.fuse.reader(norm(stayed)),
            "cross_attn_concat": lambda: task.fuse.reader(norm(everything)),
        }[fusion]()
        expected = task.head(tokens)
    torch.testing.assert_close(task.logits(images)[0], expected, rtol=1e-4, atol=1e-4)
    low = expected.transpose(1, 2).unflatten(2, (8, 8))
    full_map = F.interpolate(low, size=(64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(task(images), full_map, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fusion", OTHER_FUSIONS)
@torch.no_grad()
def test_a_deployed_backbone_gives_the_same_maps(fusion):
    task = segmenter(fusion).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = task(images)
    task.backbone = cropr.deploy(task.backbone)
    torch.testing.assert_close(task(images), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_dtop_prunes_the_most_confident_tokens():
    task = segmenter("dtop").eval()
    images = torch.randn(1, 3, 64, 64)
    plain = cropr.remove(copy.deepcopy(task.backbone))
    x = plain.blocks[0](plain.embed(images)[0])
    sure = task.backbone.cropr[0].classify(x).softmax(-1).amax(-1)[0, 1:]
    pruned = cropr.pruning_map(task.backbone, images).flatten() == 1
    assert pruned.sum() == 10 and sure[pruned].min() >= sure[~pruned].max()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_dtop_predicts_and_learns_from_active_tokens(schedule):
    task = segmenter("dtop", **SCHEDULES[schedule])
    images, target = torch.randn(2, 3, 64, 64), torch.randint(0, CLASSES, (2, 64, 64))
    blocks = cropr.pruning_map(task.backbone, images).flatten(1)
    aux = task.logits(images, predict=True)[1]
    labels, expected = target[:, 4::8, 4::8].flatten(1), 0
    for layer, prediction in enumerate(aux):
        active = blocks > layer
        assert torch.equal(active, ~prediction.isnan().any(-1))
        expected = expected + F.cross_entropy(prediction[active], labels[active])
    torch.testing.assert_close(task(images, target)["aux"], expected)


def test_models_that_cannot_be_fused_raise():
    with pytest.raises(
        ValueError, match=r"fusion must be one of concat, cross_attn, .*, got 'sum'"
    ):
        FusedSegmenter(
            cropr.apply(reference_vit(num_classes=0), rate=4), 3, grid=(8, 8), fusion="sum"
        )
    full = cropr.apply(reference_vit(num_classes=0), rate=4, llf=True)
    with pytest.raises(ValueError, match="pruned with llf=False, got llf=True"):
        FusedSegmenter(full, 3, grid=(8, 8), fusion="concat")
    with pytest.raises(TypeError, match="FusedSegmenter: the model is not pruned"):
        FusedSegmenter(reference_vit(num_classes=0), 3, grid=(8, 8), fusion="concat")
    with pytest.raises(TypeError, match="neither the engine nor merging can take it"):
        Confident(8, 3).query()


def test_every_fusion_has_a_published_row():
    assert set(FUSIONS) == {*OTHER_FUSIONS, "unpruned", "llf"}
