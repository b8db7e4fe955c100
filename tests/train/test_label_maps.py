"""Label maps of segmentation: read as labels, or named."""

import re

import pytest
import torch
from helpers.extras import require
from helpers.tasks import RECIPES, write_scenes

from cropr_kernels.train import Config
from cropr_kernels.train.data import Samples, load_data

require("torchvision")
Image = pytest.importorskip("PIL.Image", reason="needs the train extra")


@pytest.fixture
def scenes(tmp_path):
    return write_scenes(tmp_path, 4)


def load(folder, **options):
    return load_data(
        Config(data=str(folder), batch_size=4, workers=0, **{**RECIPES["segmentation"], **options})
    )


def rewrite(folder, convert, split="train"):
    """Convert the label maps of a split; return their paths."""
    paths = sorted((folder / split / "labels").iterdir())
    for path in paths:
        with Image.open(path) as image:
            converted = convert(image)
        converted.save(path)
    return paths


def with_palette(image):
    palette = image.copy()
    palette.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200, 0, 0, 0])
    assert palette.mode == "P"
    return palette


def with_16_bits(image):
    return Image.fromarray(
        torch.tensor(list(image.getdata())).view(64, 80).numpy().astype("uint16")
    )


@pytest.mark.parametrize("convert", [with_palette, with_16_bits])
def test_palettes_and_integers_of_one_channel_are_read_as_labels(convert, scenes):
    expected = [load(scenes).val[index][1] for index in range(4)]
    rewrite(scenes, convert, "val")
    val = load(scenes).val
    for index in range(4):
        assert torch.equal(val[index][1], expected[index])


def test_binary_masks_are_labels_0_and_1(scenes):
    rewrite(scenes, lambda image: image.point(lambda label: 255 * (label == 1)).convert("1"), "val")
    assert load(scenes).val[1][1].unique().tolist() == [0, 1]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_masks_of_several_channels_are_named(mode, scenes):
    paths = rewrite(scenes, lambda image: image.convert(mode))
    message = (
        rf"segmentation: {re.escape(str(paths[0]))} must have one channel of integers or a "
        rf"palette .*, got mode {mode}$"
    )
    with pytest.raises(ValueError, match=message):
        load(scenes)
    _, second = rewrite(scenes, lambda image: image.convert("L"))[:2]
    data = load(scenes)
    with Image.open(second) as image:
        image.convert(mode).save(second)
    with pytest.raises(ValueError, match=rf"{re.escape(str(second))} must have one channel"):
        data.train[1]


@pytest.mark.parametrize("split", ["train", "val"])
def test_label_maps_without_any_labelled_pixel_raise(split, scenes):
    rewrite(scenes, lambda image: image.point(lambda _: 3), split)
    folder = re.escape(str(scenes / split / "labels"))
    message = (
        f"segmentation: a label map in {folder} must have a pixel of another label than "
        "ignore_index=3, none has$"
    )
    with pytest.raises(ValueError, match=message):
        load(scenes)
    rewrite(scenes, lambda image: image.point(lambda _: 0), split)
    with pytest.raises(ValueError, match=message):
        load(scenes, reduce_zero_label=True)


def test_maps_of_another_size_and_damaged_ones_are_named_as_samples(scenes):
    damaged, smaller = rewrite(scenes, lambda image: image.crop((0, 0, 40, 40)))[:2]
    damaged.write_bytes(b"no picture")
    data = load(scenes)
    with pytest.raises(OSError, match=re.escape(str(damaged))):
        data.train[0]
    with pytest.raises(OSError, match=re.escape(f"{smaller} is (40, 40), its photo (64, 80)")):
        data.train[1]


def test_a_photo_without_a_labelled_pixel_is_replaced_and_counted_in_training_only(scenes):
    for split in ("train", "val"):
        path = scenes / split / "labels" / "02.png"
        with Image.open(path) as image:
            void = image.point(lambda _: 3)
        void.save(path)
    data = load(scenes)
    assert Samples(data.train, 0)[0, 2].skipped == 1 and Samples(data.train, 0)[0, 1].skipped == 0
    assert Samples(data.val, 0)[0, 2].skipped == 0
    with pytest.raises(
        OSError, match=r"train/labels/02.png has no labelled pixel, all are ignore_index=3"
    ):
        data.train[2]
