"""`cropr map`: pictures of the patches dropped from photos."""

import itertools
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.extras import require
from helpers.models import reference_vit

import cropr_kernels as cropr
from cropr_kernels.cli import __main__ as cli
from cropr_kernels.cli.map import distinct_names
from cropr_kernels.utils import viz

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"
Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
require("matplotlib")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(cropr.create_vit("vit_tiny_patch16_224", num_classes=5).state_dict(), path)
    return path


def test_frames_show_the_patches_kept_after_each_block(tmp_path):
    image, last_blocks = torch.zeros(3, 8, 8), torch.tensor([[1, 2], [4, 4]])
    animation, strip = tmp_path / "a.gif", tmp_path / "a.png"
    viz.save_pruning_frames(animation, strip, image, last_blocks, depth=4)
    with Image.open(strip) as sheet:
        assert sheet.size == (32, 8 + viz.CAPTION)
        alive = [
            [
                sheet.getpixel((8 * block + x, viz.CAPTION + y)) == (0, 0, 0)
                for y in (1, 5)
                for x in (1, 5)
            ]
            for block in range(4)
        ]
    assert alive == [
        [True] * 4,
        [False, True, True, True],
        [False, False, True, True],
        [False, False, True, True],
    ]
    with Image.open(animation) as frames:
        assert frames.n_frames >= 3 and frames.size == (8, 8 + viz.CAPTION)


def test_the_command_writes_a_sheet_an_animation_and_frames(weights, tmp_path, capsys):
    out, queries = tmp_path / "maps", tmp_path / "queries.safetensors"
    photos = [str(PHOTOS / "rocket.jpg"), str(PHOTOS / "coffee.jpg")]
    assert (
        cli.main(["map", str(weights), *photos, photos[0], "--rate", "10", "--out", str(out)]) == 0
    )
    text = capsys.readouterr().out
    kept = [int(count) for count in re.findall(r"(\d+) of 196 patches are kept", text)]
    assert len(kept) == 3 and kept[0] == kept[2] != kept[1]  # one photo twice
    assert min(kept) > 0 and max(kept) < 150 and "calibrated on these 3 photos" in text
    names = {
        f"{name}{end}"
        for name in ("rocket", "coffee", "rocket_2")
        for end in (".gif", "_blocks.png")
    }
    assert {path.name for path in out.iterdir()} == names | {"maps.png", "merged.png"}
    with Image.open(out / "coffee.gif") as animation:
        assert animation.n_frames == 12
    cropr.save_queries(cropr.apply(reference_vit(embed_dim=192, depth=12), rate=1), queries)
    (out / "merged.png").unlink()
    assert (
        cli.main(["map", str(weights), photos[0], "--queries", str(queries), "--out", str(out)])
        == 0
    )
    assert not (out / "merged.png").exists()  # the queries say that tokens are dropped
    assert "calibrated" not in capsys.readouterr().out


def test_names_of_pictures_cannot_meet():
    paths = [
        "img.jpg",
        "img_2.jpg",
        "sub/img.jpg",
        "sub/img.png",
        "sub/IMG.jpg",
        "img_2_2.jpg",
        "sub/img_2.jpg",
    ]
    names = distinct_names([*map(Path, paths)])
    assert names == ["img", "img_2", "img_3", "img_4", "IMG_5", "img_2_2", "img_2_3"]
    for order in itertools.permutations(paths):
        names = distinct_names([*map(Path, order)])
        assert len({name.lower() for name in names}) == len(paths)
        assert {"img_2_2", "img_2"} <= {*names}  # photos keep a name that is theirs alone


def test_the_first_photos_are_drawn_and_one_line_says_how_to_draw_all(weights, tmp_path, capsys):
    folder, out = tmp_path / "photos", tmp_path / "maps"
    for name in ("b", "sub/a", "sub/b"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PHOTOS / "coffee.jpg", folder / f"{name}.jpg")
    (folder / "a.jpg").write_bytes(b"no photo")
    command = ["map", str(weights), str(folder), "--rate", "2", "--quiet", "--out", str(out)]
    assert cli.main([*command, "--limit", "2"]) == 0
    text = capsys.readouterr().out
    assert (
        text.count("the first 2 of 4 photos: --limit 4 draws all\n") == 1
        and "calibrated on these 2 photos" in text
    )
    assert {path.name for path in out.glob("*.gif")} == {"b.gif", "a.gif"}
    assert cli.main([*command, "--limit", "4"]) == 0
    text = capsys.readouterr().out
    assert "draws all" not in text and re.search(
        rf"b_2_blocks.png: 1\d\d of 196 patches are kept of {re.escape(str(folder))}/sub/b.jpg",
        text,
    )
    assert {path.name for path in out.glob("*.gif")} == {"b.gif", "a.gif", "b_2.gif"}


def test_unreadable_photos_and_illegal_rates_are_named(weights, tmp_path, capsys):
    for images, more, message in [
        ([tmp_path / "none"], [], "there is no photo or folder"),
        ([tmp_path], [], "no photos (.bmp"),
        ([__file__], [], "cannot identify image file"),
        (
            [PHOTOS / "rocket.jpg"],
            ["--rate", "40"],
            "schedule: rate must be at most 17 for 197 tokens",
        ),
        ([PHOTOS / "rocket.jpg"], ["--queries", str(tmp_path / "none.pt")], "none.pt"),
    ]:
        arguments = ["map", str(weights), *map(str, images), "--out", str(tmp_path / "out"), *more]
        assert cli.main(arguments) == 1 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
