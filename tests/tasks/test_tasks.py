"""Tasks: their targets, losses and outputs, against slow and obvious definitions; and that each of them learns."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers.models import randomise, reference_vit, timm_eva, timm_vit
from torch import nn

import cropr_kernels as cropr

pytest.importorskip("torchvision", reason="needs the train extra")

from cropr_kernels.tasks import Classifier, Detector, Segmenter
from cropr_kernels.tasks.detection import patch_categories
from cropr_kernels.tasks.segmentation import patch_labels, pixel_loss

BACKBONES = {
    "reference": lambda: reference_vit(num_classes=0),
    "reference, average": lambda: reference_vit(num_classes=0, class_token=False, global_pool="avg"),
    "timm ViT": lambda: timm_vit(num_classes=0, dynamic_img_size=True),
    "timm EVA-02": lambda: timm_eva(num_classes=0, dynamic_img_size=True),
}
CLASSES = 3


def segmenter(name="reference", grid=(8, 8), rate=9, **options):
    model = BACKBONES[name]()
    patches = grid[0] * grid[1]
    cropr.apply(model, rate=rate, llf=True, num_queries=patches, num_outputs=CLASSES, **options)
    return randomise(Segmenter(model, CLASSES, grid=grid)).train()


# Classification


def test_soft_targets_and_smoothing_reach_every_head():
    model = cropr.apply(reference_vit(), rate=8)
    task = Classifier(model, smoothing=0.1).train()
    images, labels = torch.randn(3, 3, 64, 64), torch.tensor([0, 3, 4])
    found = task(images, labels)
    output, aux = model(images)
    target = F.one_hot(labels, 5) * 0.9 + 0.1 / 5
    expected = [-(target * logits.log_softmax(1)).sum(1).mean() for logits in (output, *aux)]
    torch.testing.assert_close(found["main"], expected[0])
    torch.testing.assert_close(found["aux"], sum(expected[1:]))
    mixed = torch.rand(3, 5).softmax(1)
    torch.testing.assert_close(Classifier(model)(images, mixed)["main"], -(mixed * output.log_softmax(1)).sum(1).mean())
    task.eval()
    assert torch.equal(task(images), model(images)) and len(task.predictions(images)) == 4
    assert torch.equal(task.predictions(images)[-1], model(images))
    several = cropr.apply(reference_vit(), rate=8, num_queries=4)
    aux = several.train()(images)[1]
    expected = sum(F.cross_entropy(prediction.mean(1), labels) for prediction in aux)
    torch.testing.assert_close(Classifier(several)(images, labels)["aux"], expected)
    assert Classifier(several).predictions(images)[0].shape == (3, 5)
    unpruned = Classifier(reference_vit()).train()
    assert unpruned(images, labels)["aux"] == 0 and len(unpruned.predictions(images)) == 1
    with pytest.raises(ValueError, match=r"smoothing must be in \[0, 1\), got 1"):
        Classifier(model, smoothing=1)


# Semantic segmentation


def test_labels_of_patches_are_those_at_their_centres():
    target = torch.randint(0, 9, (2, 24, 40))
    expected = target[:, 4::8, 4::8].flatten(1)
    assert torch.equal(patch_labels(target, (3, 5)), expected)


def test_pixels_without_a_class_count_nowhere():
    logits, target = torch.randn(2, CLASSES, 4, 4), torch.randint(0, CLASSES, (2, 4, 4))
    target[0, :2] = 255
    valid = target != 255
    expected = F.cross_entropy(logits.permute(0, 2, 3, 1)[valid], target[valid])
    torch.testing.assert_close(pixel_loss(logits, target, 255), expected)
    assert pixel_loss(logits, torch.full_like(target, 255), 255) == 0


@pytest.mark.parametrize("name", BACKBONES)
def test_segmentation_trains_every_parameter_and_runs_at_other_sizes(name):
    task = segmenter(name)
    images, target = torch.randn(2, 3, 64, 64), torch.randint(0, CLASSES, (2, 64, 64))
    target[0] = 255  # an empty annotation
    losses = task(images, target)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    unused = [name for name, p in task.named_parameters() if p.grad is None or not p.grad.any()]
    # the class token is read by nobody but the tokens; k_bias and the like have no gradient at all
    assert [name for name in unused if "queries" in name or "head" in name or "aggregator" in name] == []
    task.eval()
    with torch.no_grad():
        assert task(images).shape == (2, CLASSES, 64, 64)
        predictions = task.predictions(images)
        assert [p.shape for p in predictions] == [(2, 64, CLASSES)] * len(predictions)
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
def test_a_sliding_window_averages_what_overlaps_and_takes_small_images():
    task = segmenter().eval()
    images = torch.randn(1, 3, 80, 112)
    total, count = torch.zeros(1, CLASSES, 80, 112), torch.zeros(80, 112)
    for top in (0, 16):
        for left in (0, 40, 48):
            total[:, :, top : top + 64, left : left + 64] += task(images[:, :, top : top + 64, left : left + 64])
            count[top : top + 64, left : left + 64] += 1
    torch.testing.assert_close(task.slide(images, (64, 64), (40, 40)), total / count)
    small = images[:, :, :50, :30]
    expected = task(F.pad(small, (0, 34, 0, 14)))[:, :, :50, :30]
    torch.testing.assert_close(task.slide(small, (64, 64), (40, 40)), expected)
    with pytest.raises(ValueError, match=r"stride must be from 1 to the window's size \(64, 64\), got \(65, 40\)"):
        task.slide(images, (64, 64), (65, 40))


def test_a_map_that_is_not_square():
    model = reference_vit(num_classes=0)
    cropr.apply(model, rate=30, llf=True, num_queries=96, num_outputs=CLASSES, img_size=(64, 96))
    task = Segmenter(model, CLASSES, grid=(8, 12)).train()
    losses = task(torch.randn(2, 3, 64, 96), torch.randint(0, CLASSES, (2, 64, 96)))
    assert sum(losses.values()).isfinite()


# Detection


def targets_of(*images, masks=False):
    made = []
    for boxes, labels in images:
        one = {"boxes": torch.tensor(boxes).reshape(-1, 4).float(), "labels": torch.tensor(labels, dtype=torch.int64)}
        if masks:
            one["masks"] = torch.zeros(len(labels), 64, 64, dtype=torch.uint8)
            for mask, (x0, y0, x1, y1) in zip(one["masks"], one["boxes"].int().tolist()):
                mask[y0:y1, x0:x1] = 1
        made.append(one)
    return made


BOXES = [([[0, 0, 16, 8], [9, 9, 30, 31]], [1, 3]), ([], []), ([[50, 50, 64, 64], [56, 56, 60, 60]], [2, 2])]


@pytest.mark.parametrize("masks", [False, True])
def test_a_patch_has_the_categories_of_the_objects_that_touch_it(masks):
    found = patch_categories(targets_of(*BOXES, masks=masks), 3, (8, 8), (8, 8))
    expected = torch.zeros(3, 8, 8, 3)
    for image, (boxes, labels) in enumerate(BOXES):
        for (x0, y0, x1, y1), label in zip(boxes, labels):
            for row in range(8):
                for column in range(8):
                    inside = x0 < 8 * column + 8 and x1 > 8 * column and y0 < 8 * row + 8 and y1 > 8 * row
                    expected[image, row, column, label - 1] = max(
                        float(inside), expected[image, row, column, label - 1]
                    )
    assert torch.equal(found, expected.flatten(1, 2))


def detector(masks=False, windows=None, name="reference", **options):
    model = BACKBONES[name]()
    per_row = 16 if windows else 64
    schedule = {"rate": 4} if windows else {"rate": 20}
    cropr.apply(model, **(schedule | options), llf=True, windows=windows, num_queries=per_row, num_outputs=3)
    return Detector(model, 3, img_size=(64, 64), masks=masks, channels=16).train()


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
        found = task([torch.rand(3, 50, 90), torch.rand(3, 120, 40)])
    for one, (height, width) in zip(found, [(50, 90), (120, 40)]):
        assert set(one) == {"boxes", "labels", "scores", *(["masks"] if masks else [])}
        assert (one["boxes"][:, [0, 2]] <= width).all() and (one["boxes"][:, [1, 3]] <= height).all()
        assert not masks or one["masks"].shape[1:] == (1, height, width)


@pytest.mark.filterwarnings("ignore")
def test_under_autocast_a_detectors_heads_take_16_bits_and_what_boxes_are_read_from_32():
    task, made = detector(masks=True), {}
    for name, layer in task.named_modules():
        layer.register_forward_hook(lambda layer, inputs, output, name=name: made.update({name: output}))
    images, target = [torch.rand(3, 64, 64) for _ in BOXES], targets_of(*BOXES, masks=True)
    torch.manual_seed(0)
    expected = task(images, target)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = task(images, target)
        found = task.eval()(images)[0]["boxes"]
    for name in ("rpn.head.conv.0.0", "roi_heads.box_head.fc7", "roi_heads.mask_head.0.0"):
        assert made[name].dtype == torch.bfloat16, name
    predicted = [*made["rpn.head"][0], *made["rpn.head"][1], *made["roi_heads.box_predictor"], found]
    assert {one.dtype for one in [*predicted, made["roi_heads.mask_predictor"]]} == {torch.float32}
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, rtol=0.05, atol=0.0)


@pytest.mark.filterwarnings("ignore")
def test_a_detector_is_calibrated_on_what_its_backbone_sees(scenes, tmp_path):
    pytest.importorskip("torchmetrics", reason="needs the train extra")
    from cropr_kernels.train import Config, build
    from cropr_kernels.train.data import Samples, load_data
    from cropr_kernels.train.loop import Place, Run

    config = Config(
        data=str(scenes), model_options=("depth=4", "embed_dim=32", "num_heads=2"), patch_size=8, rate=3, llf=True,
        calibrate=6, batch_size=4, workers=0, device="cpu",
        **{**RECIPES["detection"], "window": 0, "global_blocks": ()},
    )  # fmt: skip
    data, task = load_data(config), build.task(config, 2)
    expected = build.task(config, 2)
    photos = [Samples(data.train, config.seed)[-1, i].image for i in range(6)]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    torch.testing.assert_close(task.pixels(photos), torch.stack([(photo - mean) / std for photo in photos]))
    cropr.calibrate(expected.backbone, expected.pixels(photos))
    Run(config, tmp_path, data, task, Place(0, 1, torch.device("cpu")), False)
    for own, other in zip(task.backbone.cropr, expected.backbone.cropr):
        torch.testing.assert_close(own.query(), other.query())


def test_nearly_all_tokens_may_leave():
    task = detector(windows=cropr.Windows(8), keep=[20, 2], rate=None)  # 3 % of 64
    assert task.backbone.cropr[0].queries.shape == (16, 64)
    losses = task.eval()([torch.rand(3, 64, 64)])
    assert len(losses) == 1


def test_what_a_task_cannot_do_is_refused():
    pruned = cropr.apply(reference_vit(num_classes=0), rate=4)
    with pytest.raises(ValueError, match=r"the pyramid needs the whole map: cropr.apply\(..., llf=True\)"):
        Detector(pruned, 3, img_size=(64, 64))
    with pytest.raises(ValueError, match="img_size must be square, got 64 x 96"):
        Detector(reference_vit(num_classes=0), 3, img_size=(64, 96))
    with pytest.raises(ValueError, match="no such option box_size, rpn_anchor_generator; options are rpn_head,"):
        Detector(reference_vit(num_classes=0), 3, img_size=(64, 64), box_size=3, rpn_anchor_generator=None)
    with pytest.raises(ValueError, match=r"dense tasks need the whole map: cropr.apply\(..., llf=True\)"):
        Segmenter(pruned, 3, grid=(8, 8))(torch.rand(1, 3, 64, 64))


# Each recipe, end to end


def write_scenes(folder, count):
    """Squares of two colours on noise: photos, label maps and COCO annotations. 3 is no class."""
    image = pytest.importorskip("PIL.Image", reason="needs the train extra")
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for part in ("photos", "labels"):
            (folder / split / part).mkdir(parents=True)
        about = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "red"}, {"id": 9, "name": "blue"}]}
        for i in range(count):
            pixels = torch.randint(0, 100, (64, 80, 3), generator=generator, dtype=torch.uint8)
            labels = torch.zeros(64, 80, dtype=torch.uint8)
            labels[0] = 3
            about["images"].append({"id": i, "file_name": f"{i:02}.png", "width": 80, "height": 64})
            for category in range(2 if i else 0):  # the first photo is empty
                top, left = torch.randint(0, 32, (2,), generator=generator).tolist()
                left = left // 2 + 40 * category
                pixels[top : top + 24, left : left + 24, 2 * category] = 250
                labels[top : top + 24, left : left + 24] = category + 1
                corners = [left, top, left + 24, top, left + 24, top + 24, left, top + 24]
                about["annotations"].append(
                    {"id": len(about["annotations"]) + 1, "image_id": i, "category_id": 7 + 2 * category, "iscrowd": 0,
                     "bbox": [left, top, 24, 24], "area": 576, "segmentation": [corners]}
                )  # fmt: skip
            image.fromarray(pixels.numpy()).save(folder / split / "photos" / f"{i:02}.png")
            image.fromarray(labels.numpy()).save(folder / split / "labels" / f"{i:02}.png")
        (folder / split / "boxes.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), 16)


RECIPES = {
    "segmentation": dict(
        task="segmentation", train_split=("train/photos", "train/labels"), val_split=("val/photos", "val/labels"),
        num_classes=3, ignore_index=3, img_size=(64, 64), scale=(0.9, 1.1), lr=3e-3, epochs=12, curriculum=0.5,
    ),
    "detection": dict(
        task="detection", train_split=("train/photos", "train/boxes.json"),
        val_split=("val/photos", "val/boxes.json"), img_size=(64, 64), scale=(0.9, 1.2), lr=1e-3, epochs=10,
        window=4, global_blocks=(1, 3), flip=0.0, channels=16,
    ),
}  # fmt: skip
REACHES = {"segmentation": ("mIoU", 60), "detection": ("AP box 50", 8)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_learns_and_its_commands_measure_and_draw(name, scenes, tmp_path, capsys):
    pytest.importorskip("torchmetrics", reason="needs the train extra")
    from cropr_kernels.cli import __main__ as cli
    from cropr_kernels.train import Config, train

    config = Config(
        data=str(scenes), model_options=("depth=5", "embed_dim=64", "num_heads=2"), patch_size=8, rate=3, llf=True,
        batch_size=4, workers=0, device="cpu", eval_epochs=100, **RECIPES[name],
    )  # fmt: skip
    reached = train(config, tmp_path, show=False)
    metric, least = REACHES[name]
    assert reached[metric] > least, reached
    assert cli.main(["eval", str(tmp_path), "--quiet", "--pictures", "2"]) == 0
    assert metric in capsys.readouterr().out
    assert (tmp_path / "maps.png").exists() and (tmp_path / "curves.png").exists()


def test_a_label_map_that_is_missing_is_named(scenes, tmp_path):
    from cropr_kernels.train import Config
    from cropr_kernels.train.data import load_data

    (tmp_path / "photos").symlink_to(scenes / "train" / "photos")
    (tmp_path / "labels").mkdir()
    config = Config(task="segmentation", data=str(tmp_path), num_classes=3, train_split=("photos", "labels"))
    with pytest.raises(ValueError, match=r"00.png has no label map in .*labels"):
        load_data(config)
    fewer = Config(
        task="segmentation", data=str(scenes), num_classes=2, ignore_index=3, img_size=(64, 64),
        train_split=("train/photos", "train/labels"), val_split=("val/photos", "val/labels"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"01.png has label 2; labels must be below num_classes=2 or ignore_index=3"):
        load_data(fewer).train[1]


def test_a_task_is_a_module_of_the_users_own_loop():
    task = segmenter()
    assert isinstance(task, nn.Module) and not any(key.startswith("module") for key in task.state_dict())


# Metrics


@pytest.mark.filterwarnings("ignore")
def test_overlap_is_that_of_the_classes_that_occur():
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
        Config(task="segmentation", num_classes=5, ignore_index=9, img_size=(32, 32)), 5, torch.device("cpu")
    )
    metric.update(Guess(), torch.zeros(2, 3, 6, 7), truth)
    valid, overlaps = truth != 9, []
    for label in range(3):  # classes 3 and 4 occur nowhere
        own, true = guesses[valid] == label, truth[valid] == label
        overlaps.append(((own & true).sum() / (own | true).sum()).item())
    found = metric.compute()
    assert found["mIoU"] == pytest.approx(100 * sum(overlaps) / 3, abs=1e-3)
    assert found["pixels"] == pytest.approx(100 * (guesses == truth)[valid].double().mean().item(), abs=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("finds", [True, False])
def test_precision_of_what_is_found_exactly_is_100_and_of_nothing_0(finds):
    pytest.importorskip("torchmetrics", reason="needs the train extra")
    from cropr_kernels.train import Config
    from cropr_kernels.train.evaluate import Precision

    truths = targets_of(([[5, 5, 40, 40], [20, 10, 60, 60]], [1, 2]), ([], []), masks=True)

    def found(images):
        return [
            {
                "boxes": one["boxes"] if finds else one["boxes"][:0],
                "labels": one["labels"] if finds else one["labels"][:0],
                "scores": torch.ones(len(one["labels"]) if finds else 0),
                "masks": one["masks"][:, None].float() if finds else one["masks"][:0, None].float(),
            }
            for one in truths
        ]

    metric = Precision(Config(task="detection", masks=True), 2, torch.device("cpu"))
    metric.update(found, [torch.zeros(3, 64, 64)] * 2, truths)
    value = 100.0 if finds else 0.0
    assert metric.compute() == {"AP box": value, "AP box 50": value, "AP mask": value, "AP mask 50": value}
