"""Commands on damaged and unusual photos and shards: none lost, none misread, no run that ends
early."""

import io
import os
import tarfile
import threading
from pathlib import Path

import pytest
import torch
from helpers.photos import png_header

import cropr_kernels as cropr
from cropr_kernels.cli import __main__ as cli
from cropr_kernels.utils import images

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
PHOTOS = Path(__file__).parents[2] / "examples" / "photos"
PHOTO = PHOTOS / "coffee.jpg"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny.pt"
    torch.save(cropr.create_vit("vit_tiny_patch16_224", num_classes=5).state_dict(), path)
    return str(path)


def infer(model, source, out):
    return ["infer", str(model), str(source), "--rate", "0", "--quiet", "--out", str(out)]


def rows_of(out):
    dataset = pytest.importorskip("pyarrow.dataset", reason="pyarrow is not installed")
    return dataset.dataset(out, format="parquet").to_table().to_pylist()


@pytest.fixture
def awkward(tmp_path):
    """Return a folder with good photos and with every file that once ended a run."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "good.jpg").write_bytes(PHOTO.read_bytes())
    (folder / "bomb.png").write_bytes(png_header(20000, 20000))
    (folder / "torn.jpg").write_bytes(PHOTO.read_bytes()[:3000])
    (folder / "empty.png").write_bytes(b"")
    (folder / "truncated.png").write_bytes(png_header(16, 16))
    Image.new("RGB", (1, 6000)).save(folder / "line.png")
    (folder / "note.txt").write_text("no photo")
    (folder / "phone.HEIC").write_bytes(b"")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "loop").symlink_to(folder)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked.jpg").write_bytes(PHOTO.read_bytes())
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    with open(os.fsencode(folder) + b"/caf\xe9.jpg", "wb") as file:
        file.write(PHOTO.read_bytes())
    return folder


BAD = {"bomb.png", "torn.jpg", "empty.png", "truncated.png"}


def test_unreadable_photos_become_rows_with_errors(model, awkward, tmp_path, capsys):
    assert cli.main(infer(model, awkward, tmp_path / "out")) == 0
    rows = {row["name"]: row for row in rows_of(tmp_path / "out")}
    assert set(rows) == BAD | {"good.jpg", "line.png", "link/linked.jpg", "caf\\xe9.jpg"}
    assert {name for name, row in rows.items() if row["error"]} == BAD
    assert (
        rows["good.jpg"]["classes"]
        == rows["caf\\xe9.jpg"]["classes"]
        == rows["link/linked.jpg"]["classes"]
    )
    printed = capsys.readouterr().out
    assert "8 photos, 4 of them unreadable" in printed
    assert "(skipped 3 files: 1 .jpg, 1 .txt, 1 .heic)" in printed or "skipped 3 files" in printed


def test_calibrate_and_map_skip_unreadable_photos_and_name_them(model, awkward, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    out = tmp_path / "queries.safetensors"
    assert (
        cli.main(["calibrate", model, str(awkward), "--rates", "1", "--quiet", "--out", str(out)])
        == 0
    )
    printed = capsys.readouterr().out
    assert (
        "4 unreadable" in printed
        and "bomb.png: Image size (400000000 pixels) exceeds limit" in printed
    )
    (awkward / "cost_$5^$.jpg").write_bytes(PHOTO.read_bytes())
    status, printed = (
        cli.main(["map", model, str(awkward), "--out", str(tmp_path / "maps")]),
        capsys.readouterr(),
    )
    assert status == 0, printed.err
    printed = printed.out
    assert (
        printed.count(f"skipped {awkward}") == 4 and (tmp_path / "maps" / "cost_$5^$.gif").exists()
    )
    only = [str(awkward / name) for name in BAD]
    assert cli.main(["map", model, *only, "--out", str(tmp_path / "maps")]) == 1
    assert "none of the 4 photos can be read" in capsys.readouterr().err


def test_a_named_pipe_is_not_waited_for(awkward):
    errors = []

    def read():
        try:
            images.load_photo(awkward / "pipe.jpg")
        except OSError as error:
            errors.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(120)
    assert len(errors) == 1 and errors[0].endswith("pipe.jpg is not a file")


def test_the_limit_of_pixels_can_be_set(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(PHOTO.read_bytes())
    assert (
        cli.main([*infer(model, tmp_path / "photos", tmp_path / "out"), "--max-pixels", "1000"])
        == 0
    )
    assert "exceeds limit of 1000 pixels" in rows_of(tmp_path / "out")[0]["error"]


# Pixels


def test_a_photo_is_read_as_timm_reads_it():
    create_transform = pytest.importorskip(
        "timm.data", reason="timm is not installed"
    ).create_transform
    for size, crop_pct, interpolation, mode in (
        ((224, 224), 0.9, "bicubic", "center"),
        ((224, 224), 0.875, "bilinear", "center"),
        ((96, 96), 1.0, "bicubic", "center"),
        ((64, 96), 0.95, "bicubic", "squash"),
    ):
        options = dict(crop_pct=crop_pct, interpolation=interpolation)
        transform = create_transform(
            (3, *size), mean=(0.0,) * 3, std=(1.0,) * 3, crop_mode=mode, **options
        )
        for path in PHOTOS.glob("*.jpg"):
            with Image.open(path) as photo:
                expected = transform(photo.convert("RGB"))
            photo = images.load_photo(path, size, **options, squash=mode == "squash")
            assert torch.equal(photo, expected) and photo.is_contiguous()


def test_infer_equals_the_transform_and_model_of_timm(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7).eval()
    hub = pytest.importorskip("timm.models", reason="timm is not installed")
    config = {
        **model.pretrained_cfg,
        "num_classes": 7,
        "crop_pct": 0.95,
        "interpolation": "bilinear",
    }
    hub.save_for_hf(model, tmp_path / "timm", model_config=config, model_args={"num_classes": 7})
    name = f"local-dir:{tmp_path / 'timm'}"
    assert cli.main([*infer(name, PHOTOS, tmp_path / "out"), "--top", "7"]) == 0
    model = timm.create_model(name, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    rows, seen = rows_of(tmp_path / "out"), []
    for row in rows:
        with Image.open(PHOTOS / row["name"]) as photo:
            seen.append(transform(photo.convert("RGB")))
    with torch.no_grad():
        outputs = model(torch.stack(seen))
    for row, output in zip(rows, outputs):
        best = output.softmax(0).topk(7)
        assert (
            row["classes"] == best.indices.tolist() and row["probabilities"] == best.values.tolist()
        )


def saved(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    file.seek(0)
    return file


def test_deep_and_rotated_photos_are_read_as_they_look():
    grey = torch.arange(64 * 64).view(64, 64) % 251
    plain = Image.fromarray(grey.to(torch.uint8).numpy())
    expected = images.load_photo(saved(plain, format="PNG"), 64, crop_pct=1.0)
    deep = Image.fromarray((grey * 257).to(torch.int32).numpy().astype("uint16"))
    ways = {"16-bit PNG": saved(deep, format="PNG"), "16-bit TIFF": saved(deep, format="TIFF")}
    for top in (1, 255, 65535):
        values = (grey.float() * top / 255).numpy()
        ways[f"float to {top}"] = saved(Image.fromarray(values), format="TIFF")
    for name, file in ways.items():
        torch.testing.assert_close(
            images.load_photo(file, 64, crop_pct=1.0), expected, rtol=0, atol=1.01 / 255, msg=name
        )
    with pytest.raises(
        OSError, match=r"pixels must be in one of \[0, 1\], \[0, 255\], \[0, 65535\], are in \[-1"
    ):
        images.load_photo(saved(Image.fromarray((grey.float() - 1).numpy()), format="TIFF"))
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    photo = Image.fromarray(torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy())
    turned = images.load_photo(saved(photo, format="PNG", exif=exif), 64, crop_pct=1.0)
    assert torch.equal(
        turned, images.load_photo(saved(photo.rotate(-90), format="PNG"), 64, crop_pct=1.0)
    )


def test_illegal_preprocessing_and_nonfinite_weights_are_rejected(model, tmp_path, capsys):
    for more, message in (
        (["--std", "0", "0", "0"], "--std positive, got"),
        (["--mean", "nan", "0", "0"], "--mean must be finite"),
        (["--crop-pct", "1.5"], "--crop-pct must be in (0, 1], got 1.5"),
    ):
        assert cli.main([*infer(model, PHOTOS, tmp_path / "out"), *more]) == 1
        assert message in capsys.readouterr().err
    state = torch.load(model)
    state["blocks.3.mlp.fc1.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    assert cli.main(infer(tmp_path / "nan.pt", PHOTOS, tmp_path / "out")) == 1
    assert (
        "nan.pt has weights that are not finite" in capsys.readouterr().err
        and not (tmp_path / "out").exists()
    )


def test_outputs_that_are_not_finite_are_errors(model, tmp_path):
    state = torch.load(model)
    state["head.weight"].fill_(3e38)
    torch.save(state, tmp_path / "large.pt")
    assert cli.main(infer(tmp_path / "large.pt", PHOTOS, tmp_path / "out")) == 0
    rows = rows_of(tmp_path / "out")
    assert {row["error"] for row in rows} == {"the model's output is not finite"}
    assert {row["classes"] for row in rows} == {None}


# Shards


def write_shard(path, members):
    with tarfile.open(path, "w") as shard:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))


def test_names_of_a_shard_are_kept_apart(model, tmp_path):
    shards, photo = tmp_path / "shards", PHOTO.read_bytes()
    shards.mkdir()
    members = [
        ("a.1.jpg", photo),
        ("a.2.jpg", b"no photo"),
        ("b.jpg", photo),
        ("b.jpg", photo),
        ("b.png", b""),
        ("c.cls", b"3"),
    ]
    write_shard(
        shards / "0.tar",
        [*members, ("../../evil.jpg", photo), (".hidden.jpg", photo), ("README", b"")],
    )
    assert cli.main(infer(model, shards, tmp_path / "out")) == 0
    rows = rows_of(tmp_path / "out")
    assert sorted(row["name"] for row in rows) == [
        "../../evil.jpg",
        "a.1.jpg",
        "a.2.jpg",
        "b.jpg",
        "b.jpg",
        "b.png",
        "c",
    ]
    assert {row["name"] for row in rows if row["error"]} == {"a.2.jpg", "b.png", "c"}


def test_a_damaged_shard_is_named_and_the_others_are_done(model, tmp_path, capsys):
    shards, photo, out = tmp_path / "shards", PHOTO.read_bytes(), tmp_path / "out"
    shards.mkdir()
    for index in range(3):
        write_shard(shards / f"{index}.tar", [(f"{index}{i}.jpg", photo) for i in range(3)])
    intact = (shards / "1.tar").read_bytes()
    second = intact.index(b"11.jpg")  # its header
    flipped = bytearray(intact)
    flipped[second + 1] ^= 4
    end = len(intact.rstrip(b"\0"))
    damaged = {
        "a flipped bit in a header": bytes(flipped),
        "cut in a photo": intact[: second + 2000],
        "cut before the end marker": intact[: -(-end // 512) * 512],
        "half an end marker": intact[: -(-end // 512) * 512 + 512],
        "bytes after the end": intact + b"x",
        "no shard": b"nothing",
        "empty": b"",
    }
    for damage, content in damaged.items():
        (shards / "1.tar").write_bytes(content)
        for _ in range(2):  # the second resumes after the first
            assert cli.main(infer(model, shards, out)) == 1, damage
            printed = capsys.readouterr()
            assert (
                "1 units failed, all others are done" in printed.err and "1.tar: " in printed.err
            ), damage
            assert len(rows_of(out)) == 6 and not (out / "_SUCCESS").exists(), damage
        for part in out.iterdir():
            part.unlink()
    (shards / "1.tar").write_bytes(intact)
    assert cli.main(infer(model, shards, out)) == 0
    assert len(rows_of(out)) == 9 and (out / "_SUCCESS").exists()
