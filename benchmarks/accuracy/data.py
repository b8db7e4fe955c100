"""The photos and the pretrained ViT-Ti of the accuracy benchmarks.

The folder --data holds tinyimagenet100_64.npz and imagenette_160.npz (buf, offsets, labels, split:
encoded photos) and the weights of a ViT-Ti whose head knows the classes of Tiny-ImageNet.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cropr_kernels.models.factory import load_weights
from cropr_kernels.models.vit import ViT

DATA = {"Tiny-ImageNet": "tinyimagenet100_64.npz", "Imagenette": "imagenette_160.npz"}
WEIGHTS = "vit_tiny_p16_224_tin200_fp16.safetensors"
TRAIN, VAL = 0, 1


def load_model(folder: Path) -> tuple[ViT, list[str]]:
    """Return the pretrained model, and the classes of its head."""
    model, metadata = load_weights(folder / WEIGHTS)
    return model.eval(), metadata["classes"].split()


class Encoded:
    """Encoded photos of one .npz file: a sample of a split, drawn by a seed."""

    def __init__(self, path: Path, split: int, count: int, seed: int):
        archive = np.load(path)
        self.bytes = archive["buf"]
        self.offsets = archive["offsets"]
        self.chosen = np.random.default_rng(seed).permutation(
            np.flatnonzero(archive["split"] == split)
        )[:count]
        self.names = [str(archive["classes"][archive["labels"][i]]).split()[0] for i in self.chosen]
        self.boxes = archive["boxes"][self.chosen] if "boxes" in archive else None

    def __len__(self) -> int:
        return len(self.chosen)

    def photo(self, index: int) -> Any:
        """Decode a photo as a Pillow image."""
        from PIL import Image

        i = self.chosen[index]
        return Image.open(
            io.BytesIO(self.bytes[self.offsets[i] : self.offsets[i + 1]].tobytes())
        ).convert("RGB")


class Photos(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Photos of Tiny-ImageNet with the classes of the pretrained head."""

    def __init__(self, encoded: Encoded, classes: list[str], transform: Any):
        self.encoded = encoded
        self.transform = transform
        self.targets = [classes.index(name) for name in encoded.names]

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.encoded.photo(index)), self.targets[index]


def read_photos(path: Path, split: int, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Photos (count, 3, 224, 224), resized, cropped and normalized, and their class names."""
    archive = Encoded(path, split, count, seed)
    photos = []
    for i in range(len(archive)):
        image = archive.photo(i)
        image = image.resize((256, 256), 3)  # bicubic
        photos.append(torch.from_numpy(np.array(image.crop((16, 16, 240, 240)))))
    return (torch.stack(photos).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5, archive.names


def patches_in(boxes: Tensor) -> Tensor:
    """Mask (B, 196) of the patches with their centre in a box (B, 4) of a photo of 64 pixels."""
    centres = (torch.arange(14) * 16 + 8 + 16) / 4
    columns = (boxes[:, :1] <= centres) & (boxes[:, 2:3] >= centres)
    rows = (boxes[:, 1:2] <= centres) & (boxes[:, 3:] >= centres)
    return (rows[:, :, None] & columns[:, None]).flatten(1)
