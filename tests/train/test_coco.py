"""Files of COCO annotations: each fault is named with its file and its annotation."""

import json
import re

import pytest
import torch
from helpers.extras import require
from helpers.tasks import RECIPES, write_scenes

from cropr_kernels.train import Config
from cropr_kernels.train.data import Samples, load_data

require("torchvision")
pytest.importorskip("faster_coco_eval", reason="needs the train extra")

NUMBER = 5  # of the annotation that is changed; its image is 3, of 64 x 80 pixels
PIXELS = 64 * 80


@pytest.fixture
def scenes(tmp_path):
    return write_scenes(tmp_path, 4)


def load(folder, masks=True):
    return load_data(
        Config(data=str(folder), masks=masks, batch_size=4, workers=0, **RECIPES["detection"])
    ).train


def unchanged(folder):
    """Load the training data as it is, without augmentation."""
    data = load(folder)
    data.train = False
    return data


def change(folder, kind="annotations", index=NUMBER - 1, **values):
    """Change fields of an entry, or delete those that are None; return the file."""
    path = folder / "train" / "boxes.json"
    content = json.loads(path.read_text())
    entry = content[kind][index] | values
    content[kind][index] = {name: value for name, value in entry.items() if value is not None}
    path.write_text(json.dumps(content))
    return path


def rle(counts, *size):
    return {"segmentation": {"counts": counts, **({"size": list(size)} if size else {})}}


ENCODED = "segmentation must be polygons of 3 points or more, or a run-length encoding, got "
SIZE = "size of its run-length encoding must be that of its image, [64, 80], got "
COUNTS = "counts of its run-length encoding must add up to 5120 pixels, got "
FAULTS = {
    "box of 3 numbers": (
        dict(bbox=[1, 2, 3]),
        "bbox must be 4 finite numbers, x, y, width and height, got [1, 2, 3]",
    ),
    "box of text": (dict(bbox=["1", 2, 3, 4]), "bbox must be 4 finite numbers"),
    "box of NaN": (dict(bbox=[1, 2, 3, float("nan")]), "bbox must be 4 finite numbers"),
    "category in a gap": (
        dict(category_id=8),
        "category_id must be that of a category in the file, got 8",
    ),
    "no segmentation": (dict(segmentation=None), f"{ENCODED}None"),
    "no polygon": (dict(segmentation=[]), f"{ENCODED}[]"),
    "bare polygon": (dict(segmentation=[1, 1, 5, 1, 5, 5]), f"{ENCODED}[1, 1, 5, 1, 5, 5]"),
    "polygon of 2 points": (dict(segmentation=[[1, 1, 5, 1]]), f"{ENCODED}[[1, 1, 5, 1]]"),
    "polygon of odd length": (dict(segmentation=[[1] * 7]), ENCODED),
    "bare encoding": (rle([1, PIXELS - 1]), f"{SIZE}None"),
    "encoding of another size": (rle([1, 15], 4, 4), f"{SIZE}[4, 4]"),
    "turned encoding": (rle([1, PIXELS - 1], 80, 64), f"{SIZE}[80, 64]"),
    "crowd of another size": (dict(iscrowd=1, **rle([1, 15], 4, 4)), f"{SIZE}[4, 4]"),
    "counts of another size": (rle([1, 15], 64, 80), f"{COUNTS}[1, 15]"),
    "negative counts": (rle([-1, PIXELS + 1], 64, 80), f"{COUNTS}[-1, 5121]"),
    "no counts": (rle(None, 64, 80), f"{COUNTS}None"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_annotation_that_does_not_fit_is_named(fault, scenes):
    values, message = FAULTS[fault]
    path = change(scenes, **values)
    with pytest.raises(
        ValueError, match=re.escape(f"detection: {path}, annotation {NUMBER}: {message}")
    ):
        load(scenes)
    if "segmentation" in values:
        load(scenes, masks=False)  # it is not read


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("annotations", dict(bbox=None), "annotations[2], of id 3, has no bbox"),
        ("annotations", dict(id=None), "annotations[2], of id None, has no id"),
        ("annotations", dict(category_id=None), "annotations[2], of id 3, has no category_id"),
        ("annotations", dict(image_id=None), "annotations[2], of id 3, has no image_id"),
        ("annotations", dict(id=1), "several annotations have the id 1"),
        ("images", dict(id=1), "several images have the id 1"),
        ("images", dict(file_name=None), "images[2], of id 2, has no file_name"),
        ("images", dict(height=None), "images[2], of id 2, has no height"),
        ("images", dict(id="two"), "invalid literal for int() with base 10: 'two'"),
    ],
)
def test_entries_without_a_field_or_with_the_id_of_another_are_named(kind, values, message, scenes):
    path = change(scenes, kind, 2, **values)
    with pytest.raises(
        ValueError, match=re.escape(f"{path} is not a file of COCO annotations: {message}") + "$"
    ):
        load(scenes)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"images": 3}', '{"images": ["a.jpg"]}'])
def test_files_of_other_content_are_named(content, scenes):
    path = scenes / "train" / "boxes.json"
    path.write_text(content)
    with pytest.raises(
        ValueError, match=re.escape(f"detection: {path} is not a file of COCO annotations: ")
    ):
        load(scenes)


def test_a_file_without_images_is_named(scenes):
    path = scenes / "train" / "boxes.json"
    path.write_text('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}')
    message = f"{path} must hold images and categories, holds 0 images and 1 categories"
    with pytest.raises(ValueError, match=re.escape(f"detection: {message}")):
        load(scenes)


def test_ids_may_have_gaps_and_annotations_of_other_images_are_left_alone(scenes):
    data = unchanged(scenes)
    expected = [data[index][1]["boxes"] for index in (2, 3)]
    change(scenes, id=1000)
    change(scenes, index=0, image_id=77, bbox=[0])
    data = unchanged(scenes)
    assert [len(data[index][1]["boxes"]) for index in range(4)] == [0, 1, 2, 2]
    for index in (2, 3):
        assert torch.equal(data[index][1]["boxes"], expected[index - 2])


def test_run_length_encodings_give_the_masks_of_their_polygons(scenes):
    from faster_coco_eval import COCO, mask

    path = scenes / "train" / "boxes.json"
    shape = COCO(str(path)).annToMask(json.loads(path.read_text())["annotations"][NUMBER - 1])
    expected = unchanged(scenes)[3][1]["masks"]
    packed = mask.encode(shape)["counts"]
    column = torch.from_numpy(shape).T.flatten()
    _, runs = column.unique_consecutive(return_counts=True)
    for counts in (
        packed if isinstance(packed, str) else packed.decode(),
        [0] * int(column[0]) + runs.tolist(),
    ):
        change(scenes, **rle(counts, 64, 80))
        assert torch.equal(unchanged(scenes)[3][1]["masks"], expected)


def test_damaged_encodings_and_photos_of_another_size_are_named(scenes):
    path = change(scenes, **rle("01", 64, 80))
    data = load(scenes)
    with pytest.raises(
        ValueError, match=re.escape(f"detection: {path}, annotation {NUMBER}: Invalid RLE")
    ):
        data[3]
    change(scenes, "images", 2, height=32, width=40)
    change(scenes, index=2, **rle([0, 32 * 40], 32, 40))
    change(scenes, index=3, **rle([0, 32 * 40], 32, 40))
    data = load(scenes)
    with pytest.raises(OSError, match=re.escape(f"02.png is (64, 80), in {path} it is (32, 40)")):
        data[2]
    data.ids = data.ids[:3]
    assert Samples(data, 0)[0, 2].skipped == 1
