"""A small model, photos in every container that `cropr infer` reads, and the rows it writes."""

import io
import itertools
import tarfile
from pathlib import Path

import pytest
import torch

import cropr_kernels as cropr

FOLDER = Path(__file__).parents[2] / "examples" / "photos"
PHOTOS = sorted(FOLDER.glob("*.jpg"))


def save_model(folder):
    """Save a small model and its queries; return the arguments of commands."""
    torch.manual_seed(0)
    plain = cropr.create_vit("vit_tiny_patch16_224", depth=3, num_classes=5)
    cropr.save(cropr.apply(plain, rate=8, num_outputs=0), folder / "model")
    return str(folder / "model")


def contents(count, broken=()):
    """Return names and contents of small photos, all different; those of `broken` are cut."""
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    shrunk = []
    for path in PHOTOS:
        with image.open(path) as photo:
            shrunk.append(photo.convert("RGB").resize((96, 96)))
    photos = {}
    for index, photo in zip(range(count), itertools.cycle(shrunk)):
        file = io.BytesIO()
        photo.rotate(index).save(file, "JPEG")
        content = file.getvalue()
        photos[f"{index:04d}.jpg"] = content[:500] if index in broken else content
    return photos


def write_folder(folder, photos):
    folder.mkdir(parents=True)
    for name, content in photos.items():
        (folder / name).write_bytes(content)
    return folder


def write_shard(path, photos):
    with tarfile.open(path, "w") as shard:
        for name, content in photos.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return path


def write_parquet(path, photos):
    """Write a column of structs as Hugging Face datasets does."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    rows = [{"bytes": content, "path": name} for name, content in photos.items()]
    table = pyarrow.table({"image": rows, "label": [*range(len(rows))]})
    pytest.importorskip("pyarrow.parquet").write_table(table, path)
    return path


def table_of(out):
    """Return all rows that were written, in the order of the parts."""
    dataset = pytest.importorskip("pyarrow.dataset", reason="pyarrow is not installed")
    return dataset.dataset(str(out), format="parquet").to_table()
