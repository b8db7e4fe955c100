"""What the page says and draws, without the page: sentences, tables, pictures, names of classes."""

import base64
import io
import json
import math
import os
import re
from types import SimpleNamespace

import pytest
import torch
from helpers.extras import require
from helpers.models import reference_vit, timm_vit
from helpers.photos import png_header
from safetensors.torch import save_file

import cropr_kernels as cropr
from cropr_kernels.models.class_names import class_names
from cropr_kernels.models.pixels import Pixels
from cropr_kernels.view import markup
from cropr_kernels.view.colors import ColorScale
from cropr_kernels.view.comparison import Calibrated, Photo, Setting, Viewer
from cropr_kernels.view.drawing import draw_tiles
from cropr_kernels.view.page import Content, Session, delete_old

require("PIL")
PIXELS = Pixels((64, 64), (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def viewer():
    torch.manual_seed(0)
    model = cropr.apply(reference_vit().eval(), rate=5, merge=True, num_outputs=0)
    model = cropr.calibrate(model, torch.randn(4, 3, 64, 64))
    return Viewer(model, PIXELS, ["a <b>", "ant", "bee", "cat", "dog"])


@pytest.fixture
def session(viewer, tmp_path):
    from PIL import Image

    pixels = torch.randint(0, 256, (90, 120, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "noise.png")
    (tmp_path / "damaged.jpg").write_bytes(b"\xff\xd8\xff\xe0 no photo")
    (tmp_path / "text.jpg").write_text("<script>alert(1)</script>")
    return Session(viewer, Content("small", [tmp_path / "noise.png"], "a file", "cpu"))


def test_tiles_have_the_mean_color_of_their_patches_white_edges_and_fade_where_dropped():
    image = torch.zeros(3, 64, 64)
    image[0, :, :32] = 1.0
    tiles = draw_tiles(image, torch.tensor([[0, 0, 1, 2], [0, 0, 1, -1]]))
    assert tiles.size == (224, 112)
    assert tiles.getpixel((50, 50)) == (255, 0, 0) and tiles.getpixel((140, 90)) == (0, 0, 0)
    assert tiles.getpixel((112, 20)) == (255, 255, 255)  # between token 0 and token 1
    assert tiles.getpixel((56, 20)) == (255, 0, 0)  # within token 0
    assert tiles.getpixel((200, 90)) == (224, 224, 224)


def test_features_keep_their_colors_where_pruning_leaves_them():
    torch.manual_seed(0)
    unpruned = torch.randn(40, 16)
    pruned = unpruned.clone()
    pruned[3] += 5
    scale = ColorScale(unpruned)
    first, second = scale.colors(unpruned), scale.colors(pruned)
    assert first.min() == 0 and first.max() == 1
    differs = (first != second).any(1)
    assert differs[3] and differs.sum() == 1
    centered = unpruned - unpruned.mean(0)
    variances = torch.linalg.svdvals(centered)[:3].square()
    torch.testing.assert_close((centered @ scale.components).square().sum(0), variances)


def test_the_answer_of_a_photo_lists_five_classes_before_and_after_escaped(session):
    photo, message = session.example(0)
    assert message == ""
    text, _, _, speed = session.show([photo, None], ["", ""], Setting(12), 4)
    logits = session.viewer.compare(photo, Setting(12))
    shares = re.findall(r">([\d.]+) %<", text)
    assert len(shares) == 10 and sum(map(float, shares)) == pytest.approx(200, abs=1)
    assert shares[::2] == [f"{100 * p:.1f}" for p in logits.unpruned.softmax(0).sort().values][::-1]
    assert shares[1::2] == [f"{100 * p:.1f}" for p in logits.pruned.softmax(0).sort().values][::-1]
    assert "a &lt;b&gt;" in text and "a <b>" not in text
    assert "Measuring rate 12, merging on cpu" in speed
    speed = session.measure([photo, None], Setting(12))
    assert session.measure([None, None], Setting(12)) == ""
    cost = session.viewer.measure(Setting(12))
    assert f"{cost.flop_ratio:.2f}" in speed and "times as fast" in speed
    assert f"<td>{cost.flops[2] / 2e6:.0f}</td>" in speed and "At rate 12, merging" in speed
    same = logits.pruned.argmax() == logits.unpruned.argmax()
    assert (">same<" in text) == same and (">changed<" in text) != same


def test_the_answer_of_a_model_without_classes_is_its_features(tmp_path):
    model = timm_vit(num_classes=0, global_pool="").eval()
    model = cropr.apply(model, rate=5, merge=True, num_outputs=0, llf=cropr.Fusion(blocks=0))
    model.global_pool = "token"
    images = torch.rand(4, 3, 64, 64)
    viewer = Viewer(cropr.calibrate(model, images), PIXELS)
    photo = Photo("noise", images[0])
    comparison = viewer.compare(photo, Setting(12))
    text = markup.photo_markup(viewer, photo, comparison, 4)
    assert f"<dt>cosine of the output</dt><dd>{comparison.agreement:.4f}</dd>" in text
    error = f"{100 * comparison.feature_error:.1f} %"
    assert f"<dt>error of the features</dt><dd>{error}</dd>" in text
    for state in ("unpruned", "pruned"):
        assert f"features, {state}: three principal components as colors" in text
    assert text.count('<img class="features"') == 2 and "<table>" not in text


def test_a_page_of_one_photo_calibrates_on_it_alone():
    model = cropr.apply(reference_vit().eval(), rate=5, num_outputs=0)
    calibrated = Viewer(model, PIXELS).calibrate([torch.rand(3, 64, 64)])
    assert calibrated[:2] == (1, 1) and math.isnan(calibrated.agreement)


def test_pictures_are_in_the_page_and_change_with_the_block_without_another_forward(session):
    from PIL import Image

    photo, _ = session.example(0)
    runs = []
    handle = session.viewer.model.register_forward_pre_hook(lambda *_: runs.append(1))
    texts = [
        session.show([photo, None], ["", ""], Setting(12, merge=False), block)[0]
        for block in range(5)
    ]
    handle.remove()
    assert len(runs) == 2  # pruned and unpruned
    addresses = [re.findall(r'src="data:image/png;base64,([^"]+)"', text) for text in texts]
    assert {len(pair) for pair in addresses} == {2}
    assert len({tiles for _, tiles in addresses}) == 4  # nothing is pruned after the last block
    with Image.open(io.BytesIO(base64.b64decode(addresses[0][1]))) as tiles:
        assert tiles.size == (224, 224)
    assert not any("http" in text or "file=" in text for text in texts)
    assert "before block 1: 64 patches in 64 tokens" in texts[0]
    assert "after block 2: 39 of 64 patches are left" in texts[2]


@pytest.mark.parametrize("name", ["damaged.jpg", "text.jpg", "gone.jpg"])
def test_a_file_that_is_no_photo_gets_a_sentence_and_is_deleted(session, tmp_path, name):
    photo, message = session.take(str(tmp_path / name))
    assert photo is None and not (tmp_path / name).exists()
    assert f"{name} cannot be read as a photo: " in message and 'role="alert"' in message
    assert str(tmp_path) not in message
    text, _, counts, speed = session.show([None, None], [message, ""], Setting(5), 4)[:4]
    assert text == message and counts == "" and speed == ""


def test_an_upload_is_deleted_when_it_is_read_and_a_bomb_is_not_decoded(session, tmp_path):
    path = tmp_path / "noise.png"
    photo, message = session.take(str(path))
    assert message == "" and photo.pixels.shape == (3, 64, 64) and not path.exists()
    (tmp_path / "bomb.png").write_bytes(png_header(20_000, 20_000))
    photo, message = session.take(str(tmp_path / "bomb.png"))
    assert photo is None and "decompression bomb" in message


def test_files_that_nothing_reads_are_deleted_when_they_are_old(tmp_path):
    for name in ("old.jpg", "new.jpg", "example.jpg"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(b"")
    for name in ("old.jpg", "example.jpg"):
        os.utime(tmp_path / "folder" / name, (0, 0))
    delete_old(tmp_path, {"example.jpg"})
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"new.jpg", "example.jpg"}


def test_each_photo_shows_its_own_counts(session):
    photos = [session.example(0)[0], Photo("gray", torch.full((3, 64, 64), 0.5))]
    counts = session.show(photos, ["", ""], Setting(8), 4)[2]
    assert "tokens, photo 1" in counts and "tokens, photo 2" in counts
    assert "Each photo keeps as many tokens as it needs" in counts


def test_two_photos_of_equal_counts_differ_in_their_tiles(session):
    photos = [session.example(0)[0], Photo("gray", torch.full((3, 64, 64), 0.5))]
    first, second, counts, _ = session.show(photos, ["", ""], Setting(8, equal_counts=True), 4)
    assert counts.count("tokens") == 2  # a row, the sentence
    assert "keeps as many tokens of both photos" in counts
    captions = [re.findall(r"after block 4: 64 patches in (\d+)", text) for text in (first, second)]
    assert captions == [["39"], ["39"]]


def test_counts_that_differ_have_rows_for_each_photo(session):
    photo, _ = session.example(0)
    rates = [session.viewer.compare(photo, Setting(rate)) for rate in (5, 8)]
    text = markup.counts_markup(rates)
    assert (
        "tokens, photo 1" in text
        and "tokens, photo 2" in text
        and "as many tokens as it needs" in text
    )


def test_the_page_says_what_queries_of_a_few_photos_are_worth(viewer):
    text = markup.calibration_markup(viewer, Calibrated(7, 4, 2 / 3, 8), "")
    assert "calibrated on 7 photos" in text and "on a few hundred photos" in text
    assert "Calibrated on 4 of them, the best class of 2 of the 3 others stays at rate 8" in text
    alone = markup.calibration_markup(viewer, Calibrated(1, 1, float("nan"), 8), "")
    assert "calibrated on 1 photo." in alone and "others" not in alone
    assert "Queries: q &lt;&gt;." in markup.calibration_markup(viewer, None, "q <>")


def test_classes_have_the_names_of_their_source(tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")
    model = reference_vit()
    path = tmp_path / "named.safetensors"
    labels = "n01443537 n01629819 n02123045 plain n09999999"
    save_file(model.state_dict(), path, {"classes": labels})
    names = class_names(model, str(path), 5)
    assert names == ["goldfish", "European fire salamander", "tabby", "plain", "n09999999"]
    save_file(model.state_dict(), path, {"classes": json.dumps(["a b", "c", "d", "e", "f"])})
    assert class_names(model, str(path), 5) == ["a b", "c", "d", "e", "f"]
    assert class_names(model, str(path), 4) is None
    config = SimpleNamespace(id2label={1: "dog, hound", 0: "cat"})
    assert class_names(SimpleNamespace(config=config), "folder", 2) == ["cat", "dog"]
    config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    assert class_names(SimpleNamespace(config=config), "folder", 2) is None
    assert class_names(model, "vit_tiny_patch16_224", 5) is None
    imagenet = timm_vit(num_classes=1000)
    imagenet.pretrained_cfg = {"num_classes": 1000}
    assert class_names(imagenet, "vit_tiny_patch16_224", 1000)[281] == "tabby"
    imagenet.pretrained_cfg = {"num_classes": 2, "label_names": ["x", "y"]}
    assert class_names(imagenet, "hf-hub:someone/model", 2) == ["x", "y"]


def test_classes_of_torchvision_have_the_names_of_its_weights():
    pytest.importorskip("torchvision", reason="the train extra is not installed")
    names = class_names(torch.nn.Identity(), "vit_b_16", 1000)
    assert names[281] == "tabby" and len(names) == 1000


def test_without_names_classes_have_numbers(viewer):
    unnamed = Viewer(cropr.apply(reference_vit(), rate=5, num_outputs=0), PIXELS)
    assert unnamed.class_name(3) == "class 3" and viewer.class_name(3) == "cat"
