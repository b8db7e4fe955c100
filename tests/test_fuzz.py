"""Files damaged at random: each ends in an answer or in one sentence, never in a traceback or a silent loss.

FUZZ_SECONDS=600 pytest tests/test_fuzz.py looks longer than the few seconds of every run, from another seed each time.
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
SECONDS = float(os.environ.get("FUZZ_SECONDS", 4))
SEED = 0 if "FUZZ_SECONDS" not in os.environ else time.time_ns()


def mutated(content, rng):
    """Bits flipped, a piece cut out, doubled or overwritten, or the end lost."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(content) + 1)
        end = min(start + rng.choice((1, 4, 64, 4096)), len(content))
        kind = rng.randrange(6)
        if kind == 0 and start < len(content):
            content[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[start:end]
        elif kind == 2:
            content[start:start] = content[start:end]
        elif kind == 3:
            content[start:end] = rng.randbytes(end - start)
        elif kind == 4:
            content[start:end] = bytes(end - start)
        elif kind == 5 and rng.random() < 0.3:
            del content[start:]
    return bytes(content)


def cases(content):
    """Damaged versions of some bytes, for a while; at least a few."""
    rng, end = random.Random(SEED), time.monotonic() + SECONDS
    for count in range(1_000_000):
        if count >= 20 and time.monotonic() > end:
            return
        yield mutated(content, rng)


def encoded(kind):
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0].astype("uint16") if kind == "PNG" else pixels).save(file, format=kind)
    return file.getvalue()


def answer(call):
    """What a call gives, or None; and what its refusal says, or None."""
    try:
        return call(), None
    except (OSError, ValueError, tarfile.TarError) as error:
        return None, str(error)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it repairs
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_a_photo_is_read_or_named(kind):
    for content in cases(encoded(kind)):
        photo, refusal = answer(lambda content=content: images.load_photo(io.BytesIO(content), 32))
        assert photo is not None or refusal
        assert photo is None or (photo.shape == (3, 32, 32) and 0 <= photo.min() <= photo.max() <= 1)


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar to compare with")
def test_a_shard_gives_what_tar_gives_or_is_named(tmp_path):
    from cropr_kernels.cli.infer import Unit, samples

    path, photo = tmp_path / "a.tar", encoded("JPEG")
    with tarfile.open(path, "w") as shard:
        for index in range(6):
            info = tarfile.TarInfo(f"{index}.jpg")
            info.size = len(photo)
            shard.addfile(info, io.BytesIO(photo))
    for content in cases(path.read_bytes()):
        path.write_bytes(content)
        found, refusal = answer(lambda: [f"{name}.jpg" for name, _ in samples(Unit("a", (), path))])
        assert found is not None or refusal
        if found is not None:
            listed = subprocess.run(["tar", "tf", path], capture_output=True, text=True)
            assert listed.returncode == 0 and listed.stdout.split() == found


def test_queries_come_back_or_are_refused(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    model, path = cropr.apply(reference_vit(), rate=8, num_outputs=0), tmp_path / "queries.safetensors"
    cropr.save_queries(model, path, {"rate": 8})
    expected, whole = [module.query().clone() for module in model.cropr], path.read_bytes()
    other = cropr.apply(reference_vit(), rate=8, num_outputs=0)
    for content in cases(whole):
        path.write_bytes(content)
        found, refusal = answer(lambda: cropr.load_queries(other, path))
        assert found is not None or str(path) in refusal
        assert found is None or all(torch.equal(own.query(), query) for own, query in zip(other.cropr, expected))


def test_checkpoints_come_back_or_are_refused(tmp_path):
    path, state = tmp_path / "last.pt", {"model": {"weight": torch.randn(50, 40)}, "step": 7, "config": "{}"}
    torch.save(state, path)
    for content in cases(path.read_bytes()):
        path.write_bytes(content)
        found, refusal = answer(lambda: load_tensors(path))
        assert found is not None or str(path) in refusal
        assert found is None or (found["step"] == 7 and torch.equal(found["model"]["weight"], state["model"]["weight"]))


def test_schedules_are_what_they_say_or_are_refused(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({"model": "vit", "keep": [50, 40, 30], "predicted": 1.5}))
    for content in cases(path.read_bytes()):
        path.write_bytes(content)
        counts, refusal = answer(lambda: cropr.Schedule(keep=path).counts(65, 4))
        assert counts is not None or refusal.startswith("schedule: ")
        assert counts is None or counts == json.loads(content)["keep"]
