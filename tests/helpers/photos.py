"""Real photos of the data folder, and files that claim to be photos."""

import io
import struct
import zlib

import pytest
import torch


def read_photos(data, count):
    """Return the first validation photos of Tiny-ImageNet, preprocessed for the pretrained model,
    and their labels."""
    np, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    archive = np.load(data / "tinyimagenet100_64.npz")
    buffer, offsets = archive["buf"], archive["offsets"]
    classes = [str(name).split()[0] for name in archive["classes"]]  # WordNet ids
    chosen = np.flatnonzero(archive["split"] == 1)[:: 5000 // count][:count]
    pixels, labels = [], []
    for i in chosen:
        photo = image.open(io.BytesIO(buffer[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB")
        photo = photo.resize((256, 256), image.Resampling.BICUBIC).crop((16, 16, 240, 240))
        pixels.append(torch.from_numpy(np.array(photo)).permute(2, 0, 1).float() / 127.5 - 1)
        labels.append(classes[int(archive["labels"][i])])
    return torch.stack(pixels), labels


def png_header(width, height):
    """Return a PNG with a header of this size and hardly any pixels."""

    def chunk(chunk_type, data):
        return (
            struct.pack(">I", len(data))
            + chunk_type
            + data
            + struct.pack(">I", zlib.crc32(chunk_type + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
