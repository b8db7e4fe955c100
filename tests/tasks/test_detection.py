"""Detection: its targets, losses, boxes and metric against slow and obvious definitions."""

import pytest
import torch
from helpers.extras import require
from helpers.models import reference_vit
from helpers.tasks import BACKBONES, RECIPES

import cropr_kernels as cropr
from cropr_kernels.tasks import Detector
from cropr_kernels.tasks.detection import patch_categories

require("torchvision")


def targets_of(*images, masks=False):
    targets = []
    for boxes, labels in images:
        target = {"labels": torch.tensor(labels, dtype=torch.int64)}
        target["boxes"] = torch.tensor(boxes).reshape(-1, 4).float()
        if masks:
            target["masks"] = torch.zeros(len(labels), 64, 64, dtype=torch.uint8)
            for mask, (x0, y0, x1, y1) in zip(target["masks"], target["boxes"].int().tolist()):
                mask[y0:y1, x0:x1] = 1
        targets.append(target)
    return targets


BOXES = [
    ([[0, 0, 16, 8], [9, 9, 30, 31]], [1, 3]),
    ([], []),
    ([[50, 50, 64, 64], [56, 56, 60, 60]], [2, 2]),
]


@pytest.mark.parametrize("masks", [False, True])
def test_a_patch_has_the_categories_of_the_objects_that_touch_it(masks):
    categories = patch_categories(targets_of(*BOXES, masks=masks), 3, (8, 8), (8, 8))
    expected = torch.zeros(3, 8, 8, 3)
    for image, (boxes, labels) in enumerate(BOXES):
        for (x0, y0, x1, y1), label in zip(boxes, labels):
            for row in range(8):
                for column in range(8):
                    inside = (
                        x0 < 8 * column + 8
                        and x1 > 8 * column
                        and y0 < 8 * row + 8
                        and y1 > 8 * row
                    )
                    expected[image, row, column, label - 1] = max(
                        float(inside), expected[image, row, column, label - 1]
                    )
    assert torch.equal(categories, expected.flatten(1, 2))


def detector(masks=False, windows=None, name="reference", **options):
    model = BACKBONES[name]()
    per_row = 16 if windows else 64
    schedule = {"rate": 4} if windows else {"rate": 20}
    cropr.apply(
        model, **(schedule | options), llf=True, windows=windows, num_queries=per_row, num_outputs=3
    )
    return Detector(model, 3, img_size=(64, 64), masks=masks, channels=16).train()


@pytest.mark.each_choice
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("windows", [None, cropr.Windows(4, (1,))], ids=["global", "windows"])
@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_detection_trains_every_head_and_finds_boxes_in_photos_of_any_size(masks, windows, name):
    task = detector(masks, windows, name)
    images = [torch.rand(3, 64, 64) for _ in BOXES]
    losses = task(images, targets_of(*BOXES, masks=masks))
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values()) and losses["aux"] > 0
    missing = [name for name, p in task.named_parameters() if p.grad is None]
    assert missing == []
    task.eval()
    with torch.no_grad():
        detections = task([torch.rand(3, 50, 90), torch.rand(3, 120, 40)])
    for detection, (height, width) in zip(detections, [(50, 90), (120, 40)]):
        assert set(detection) == {"boxes", "labels", "scores", *(["masks"] if masks else [])}
        assert (detection["boxes"][:, [0, 2]] <= width).all() and (
            detection["boxes"][:, [1, 3]] <= height
        ).all()
        assert not masks or detection["masks"].shape[1:] == (1, height, width)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_under_autocast_heads_run_in_16_bits_and_predictions_in_32():
    task, outputs = detector(masks=True), {}
    for name, layer in task.named_modules():
        layer.register_forward_hook(
            lambda layer, inputs, output, name=name: outputs.update({name: output})
        )
    images, target = [torch.rand(3, 64, 64) for _ in BOXES], targets_of(*BOXES, masks=True)
    torch.manual_seed(0)
    expected = task(images, target)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = task(images, target)
        boxes = task.eval()(images)[0]["boxes"]
    for name in ("rpn.head.conv.0.0", "roi_heads.box_head.fc7", "roi_heads.mask_head.0.0"):
        assert outputs[name].dtype == torch.bfloat16, name
    predicted = [
        *outputs["rpn.head"][0],
        *outputs["rpn.head"][1],
        *outputs["roi_heads.box_predictor"],
        boxes,
    ]
    assert {tensor.dtype for tensor in [*predicted, outputs["roi_heads.mask_predictor"]]} == {
        torch.float32
    }
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, rtol=0.05, atol=0.0)


@pytest.mark.filterwarnings("ignore")
def test_a_detector_is_calibrated_on_the_inputs_of_its_backbone(scenes, tmp_path):
    pytest.importorskip("torchmetrics", reason="needs the train extra")
    from cropr_kernels.train import Config, build
    from cropr_kernels.train.data import Samples, load_data
    from cropr_kernels.train.loop import Process, Run

    config = Config(
        data=str(scenes), model_options=("depth=4", "embed_dim=32", "num_heads=2"), patch_size=8,
        rate=3, llf=True,
        calibrate=1000, batch_size=4, workers=0, device="cpu",
        **{**RECIPES["detection"], "window": 0, "global_blocks": ()},
    )  # fmt: skip
    data, task = load_data(config), build.task(config, 2)
    expected = build.task(config, 2)
    photos = [Samples(data.train, config.seed)[-1, i].image for i in range(len(data.train))]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    torch.testing.assert_close(
        task.pixels(photos), torch.stack([(photo - mean) / std for photo in photos])
    )
    cropr.calibrate(expected.backbone, expected.pixels(photos))
    Run(config, tmp_path, data, task, Process(0, 1, torch.device("cpu")), False)
    for module, expected_module in zip(task.backbone.cropr, expected.backbone.cropr):
        torch.testing.assert_close(module.query(), expected_module.query())


def test_nearly_all_tokens_may_be_pruned():
    task = detector(windows=cropr.Windows(8), keep=[20, 2], rate=None)  # 3 % of 64
    assert task.backbone.cropr[0].queries.shape == (16, 64)
    losses = task.eval()([torch.rand(3, 64, 64)])
    assert len(losses) == 1


def test_unsupported_backbones_sizes_and_options_raise():
    pruned = cropr.apply(reference_vit(num_classes=0), rate=4)
    with pytest.raises(
        ValueError, match=r"the pyramid needs the full map: cropr.apply\(..., llf=True\)"
    ):
        Detector(pruned, 3, img_size=(64, 64))
    with pytest.raises(ValueError, match="img_size must be square, got 64 x 96"):
        Detector(reference_vit(num_classes=0), 3, img_size=(64, 96))
    with pytest.raises(
        ValueError, match="unknown option box_size, rpn_anchor_generator; options are rpn_head,"
    ):
        Detector(
            reference_vit(num_classes=0),
            3,
            img_size=(64, 64),
            box_size=3,
            rpn_anchor_generator=None,
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("finds", [True, False])
def test_precision_is_100_for_exact_detections_and_0_for_none(finds):
    pytest.importorskip("torchmetrics", reason="needs the train extra")
    from cropr_kernels.train import Config
    from cropr_kernels.train.evaluate import Precision

    truths = targets_of(([[5, 5, 40, 40], [20, 10, 60, 60]], [1, 2]), ([], []), masks=True)

    def detect(images):
        return [
            {
                "boxes": truth["boxes"] if finds else truth["boxes"][:0],
                "labels": truth["labels"] if finds else truth["labels"][:0],
                "scores": torch.ones(len(truth["labels"]) if finds else 0),
                "masks": truth["masks"][:, None].float()
                if finds
                else truth["masks"][:0, None].float(),
            }
            for truth in truths
        ]

    metric = Precision(Config(task="detection", masks=True), 2, torch.device("cpu"))
    metric.update(detect, [torch.zeros(3, 64, 64)] * 2, truths)
    value = 100.0 if finds else 0.0
    assert metric.compute() == {
        "AP box": value,
        "AP box 50": value,
        "AP mask": value,
        "AP mask 50": value,
    }
