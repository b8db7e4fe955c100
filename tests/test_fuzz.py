"""Files damaged at random: each loads or raises one sentence, without a traceback or a silent loss.

FUZZ_SECONDS=600 pytest tests/test_fuzz.py searches longer, from another seed each time.
"""

import io
import json
import os
import random
import shutil
import subprocess
import tarfile
import time

import pytest
import torch
from helpers.models import reference_vit

import cropr_kernels as cropr
from cropr_kernels.utils import images
from cropr_kernels.utils.io import load_tensors

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
SECONDS = float(os.environ.get("FUZZ_SECONDS", 1))
SEED = 0 if "FUZZ_SECONDS" not in os.environ else time.time_ns()


def mutated(content, rng):
    """Return the content with bits flipped, a piece cut out, doubled or overwritten, or the end
    lost."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(content) + 1)
        end = min(start + rng.choice((1, 4, 64, 4096)), len(content))
        damage = rng.randrange(6)
        if damage == 0 and start < len(content):
            content[start] ^= 1 << rng.randrange(8)
        elif damage == 1:
            del content[start:end]
        elif damage == 2:
            content[start:start] = content[start:end]
        elif damage == 3:
            content[start:end] = rng.randbytes(end - start)
        elif damage == 4:
            content[start:end] = bytes(end - start)
        elif damage == 5 and rng.random() < 0.3:
            del content[start:]
    return bytes(content)


def cases(content):
    """Yield damaged versions of the content for SECONDS, at least 20."""
    rng, end = random.Random(SEED), time.monotonic() + SECONDS
    for count in range(1_000_000):
        if count >= 20 and time.monotonic() > end:
            return
        yield mutated(content, rng)


def encoded(file_format):
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0].astype("uint16") if file_format == "PNG" else pixels).save(
        file, format=file_format
    )
    return file.getvalue()


def answer(call):
    """Return the result of a call and its error message; one of them is None."""
    try:
        return call(), None
    except (OSError, ValueError, tarfile.TarError) as error:
        return None, str(error)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of files that it repairs
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_a_damaged_photo_is_read_or_raises(file_format):
    for content in cases(encoded(file_format)):
        photo, message = answer(lambda content=content: images.load_photo(io.BytesIO(content), 32))
        assert photo is not None or message
        assert photo is None or (
            photo.shape == (3, 32, 32) and 0 <= photo.min() <= photo.max() <= 1
        )


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar to compare with")
def test_a_damaged_shard_gives_the_names_that_tar_lists_or_raises(tmp_path):
    from cropr_kernels.inference.units import Unit, samples

    path, photo = tmp_path / "a.tar", encoded("JPEG")
    with tarfile.open(path, "w") as shard:
        for index in range(6):
            info = tarfile.TarInfo(f"{index}.jpg")
            info.size = len(photo)
            shard.addfile(info, io.BytesIO(photo))
    for content in cases(path.read_bytes()):
        path.write_bytes(content)
        names, message = answer(lambda: [name for name, _ in samples(Unit(path))])
        assert names is not None or message
        if names is not None:
            listed = subprocess.run(["tar", "tf", path], capture_output=True, text=True)
            assert listed.returncode == 0 and listed.stdout.split() == names


def test_damaged_queries_load_unchanged_or_raise(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    model, path = (
        cropr.apply(reference_vit(), rate=8, num_outputs=0),
        tmp_path / "queries.safetensors",
    )
    cropr.save_queries(model, path, {"rate": 8})
    expected, intact = [module.query().clone() for module in model.cropr], path.read_bytes()
    other = cropr.apply(reference_vit(), rate=8, num_outputs=0)
    for content in cases(intact):
        path.write_bytes(content)
        loaded, message = answer(lambda: cropr.load_queries(other, path))
        assert loaded is not None or str(path) in message
        assert loaded is None or all(
            torch.equal(module.query(), query) for module, query in zip(other.cropr, expected)
        )


def test_damaged_checkpoints_load_unchanged_or_raise(tmp_path):
    path, state = (
        tmp_path / "last.pt",
        {"model": {"weight": torch.randn(50, 40)}, "step": 7, "config": "{}"},
    )
    torch.save(state, path)
    for content in cases(path.read_bytes()):
        path.write_bytes(content)
        loaded, message = answer(lambda: load_tensors(path))
        assert loaded is not None or str(path) in message
        if loaded is not None:
            assert loaded["step"] == 7 and torch.equal(
                loaded["model"]["weight"], state["model"]["weight"]
            )


def test_damaged_schedules_load_as_written_or_raise(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({"model": "vit", "keep": [50, 40, 30], "predicted": 1.5}))
    for content in cases(path.read_bytes()):
        path.write_bytes(content)
        counts, message = answer(lambda: cropr.Schedule(keep=path).counts(65, 4))
        assert counts is not None or message.startswith("schedule: ")
        assert counts is None or counts == json.loads(content)["keep"]
