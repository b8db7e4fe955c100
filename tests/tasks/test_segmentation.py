"""Segmentation: its targets, losses, maps and metric against slow and obvious definitions."""

import pytest
import torch
import torch.nn.functional as F
from helpers.extras import require
from helpers.models import randomize, reference_vit
from helpers.tasks import BACKBONES, CLASSES, check_a_step_and_its_maps
from torch import nn

import cropr_kernels as cropr
from cropr_kernels.tasks import Segmenter
from cropr_kernels.tasks.segmentation import patch_labels, pixel_loss

require("torchvision")


def segmenter(name="reference", grid=(8, 8), rate=9, **options):
    model = BACKBONES[name]()
    patches = grid[0] * grid[1]
    cropr.apply(model, rate=rate, llf=True, num_queries=patches, num_outputs=CLASSES, **options)
    return randomize(Segmenter(model, CLASSES, grid=grid)).train()


def test_labels_of_patches_are_those_at_their_centers():
    target = torch.randint(0, 9, (2, 24, 40))
    expected = target[:, 4::8, 4::8].flatten(1)
    assert torch.equal(patch_labels(target, (3, 5)), expected)


def test_ignored_pixels_do_not_count():
    logits, target = torch.randn(2, CLASSES, 4, 4), torch.randint(0, CLASSES, (2, 4, 4))
    target[0, :2] = 255
    valid = target != 255
    expected = F.cross_entropy(logits.permute(0, 2, 3, 1)[valid], target[valid])
    torch.testing.assert_close(pixel_loss(logits, target, 255), expected)
    assert pixel_loss(logits, torch.full_like(target, 255), 255) == 0


@pytest.mark.parametrize("name", BACKBONES)
def test_segmentation_trains_every_parameter_and_runs_at_other_sizes(name):
    task = segmenter(name)
    check_a_step_and_its_maps(task)
    with torch.no_grad():
        assert task(torch.randn(1, 3, 64, 96)).shape == (1, CLASSES, 64, 96)


def test_the_auxiliary_loss_stays_out_of_the_backbone():
    task = segmenter()
    task(torch.randn(2, 3, 64, 64), torch.randint(0, CLASSES, (2, 64, 64)))["aux"].backward()
    reached = [name for name, p in task.named_parameters() if p.grad is not None and p.grad.any()]
    assert reached and all(".cropr." in name for name in reached)


@torch.no_grad()
def test_a_deployed_backbone_gives_the_same_maps():
    task = segmenter().eval()
    images = torch.randn(2, 3, 64, 64)
    expected = task(images)
    task.backbone = cropr.deploy(task.backbone)
    torch.testing.assert_close(task(images), expected, rtol=1e-4, atol=1e-4)
    assert task.backbone.cropr.engine is not None


@torch.no_grad()
def test_sliding_windows_average_overlaps_and_pad_small_images():
    task = segmenter().eval()
    images = torch.randn(1, 3, 80, 112)
    total, count = torch.zeros(1, CLASSES, 80, 112), torch.zeros(80, 112)
    for top in (0, 16):
        for left in (0, 40, 48):
            total[:, :, top : top + 64, left : left + 64] += task(
                images[:, :, top : top + 64, left : left + 64]
            )
            count[top : top + 64, left : left + 64] += 1
    torch.testing.assert_close(task.slide(images, (64, 64), (40, 40)), total / count)
    small = images[:, :, :50, :30]
    expected = task(F.pad(small, (0, 34, 0, 14)))[:, :, :50, :30]
    torch.testing.assert_close(task.slide(small, (64, 64), (40, 40)), expected)
    with pytest.raises(
        ValueError, match=r"stride must be from 1 to the window's size \(64, 64\), got \(65, 40\)"
    ):
        task.slide(images, (64, 64), (65, 40))


def test_maps_that_are_not_square_are_learned():
    model = reference_vit(num_classes=0)
    cropr.apply(model, rate=30, llf=True, num_queries=96, num_outputs=CLASSES, img_size=(64, 96))
    task = Segmenter(model, CLASSES, grid=(8, 12)).train()
    losses = task(torch.randn(2, 3, 64, 96), torch.randint(0, CLASSES, (2, 64, 96)))
    assert sum(losses.values()).isfinite()


def test_a_segmenter_needs_the_full_map():
    pruned = cropr.apply(reference_vit(num_classes=0), rate=4)
    with pytest.raises(
        ValueError, match=r"dense tasks need the full map: cropr.apply\(..., llf=True\)"
    ):
        Segmenter(pruned, 3, grid=(8, 8))(torch.rand(1, 3, 64, 64))


def test_a_task_is_a_module_without_wrappers():
    task = segmenter()
    assert isinstance(task, nn.Module) and not any(
        key.startswith("module") for key in task.state_dict()
    )


def test_missing_label_maps_and_illegal_labels_are_named(scenes, tmp_path):
    from cropr_kernels.train import Config
    from cropr_kernels.train.data import load_data

    (tmp_path / "photos").symlink_to(scenes / "train" / "photos")
    (tmp_path / "labels").mkdir()
    parts = ("photos", "labels")
    config = Config(
        task="segmentation", data=str(tmp_path), num_classes=3, train_split=parts, val_split=parts
    )
    with pytest.raises(ValueError, match=r"00.png has no label map in .*labels"):
        load_data(config)
    fewer = Config(
        task="segmentation", data=str(scenes), num_classes=2, ignore_index=3, img_size=(64, 64),
        train_split=("train/photos", "train/labels"), val_split=("val/photos", "val/labels"),
    )  # fmt: skip
    with pytest.raises(
        ValueError,
        match=r"01.png has label 2; labels must be below num_classes=2 or ignore_index=3",
    ):
        load_data(fewer).train[1]


@pytest.mark.filterwarnings("ignore")
def test_overlap_is_the_mean_over_classes_that_occur():
    pytest.importorskip("torchmetrics", reason="needs the train extra")
    from cropr_kernels.train import Config
    from cropr_kernels.train.evaluate import Overlap

    guesses, truth = torch.randint(0, 3, (2, 6, 7)), torch.randint(0, 3, (2, 6, 7))
    truth[0, 0] = 9

    class Guess:
        def slide(self, images, size, stride):
            assert size == (32, 32) and stride == (21, 21)
            return F.one_hot(guesses, 5).permute(0, 3, 1, 2).float()

    metric = Overlap(
        Config(task="segmentation", num_classes=5, ignore_index=9, img_size=(32, 32)),
        5,
        torch.device("cpu"),
    )
    metric.update(Guess(), torch.zeros(2, 3, 6, 7), truth)
    valid, overlaps = truth != 9, []
    for label in range(3):  # classes 3 and 4 occur nowhere
        guessed, true = guesses[valid] == label, truth[valid] == label
        overlaps.append(((guessed & true).sum() / (guessed | true).sum()).item())
    metrics = metric.compute()
    assert metrics["mIoU"] == pytest.approx(100 * sum(overlaps) / 3, abs=1e-3)
    assert metrics["pixels"] == pytest.approx(
        100 * (guesses == truth)[valid].double().mean().item(), abs=1e-3
    )
