"""Photos of different sizes in one batch: packed rows against padding and one by one, interleaved.

python -m benchmarks.accuracy.image_lists --data FOLDER [--photos 32] [--rounds 9]
    [--out benchmarks/results/image_lists.json]

A pretrained ViT-Ti as timm's VisionTransformer with dynamic_img_size and as its NaFlexVit, on crops
of the example photos of 128 to 448 pixels a side. `padded` is the unpruned model on one batch: of
NaFlexVit with its mask, else on photos that zeros fill to the largest height and width, without a
mask. `list` is cropr.forward_images, unpruned and merging at R = 8, with thresholds of 128 photos
of 224 pixels. All but `padded` of the first model must return what photos one by one do. `data`
describes the folder.
"""

import argparse
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cropr_kernels as cropr
from benchmarks.accuracy.data import DATA, TRAIN, WEIGHTS, read_photos
from benchmarks.models.timing import relative_difference
from benchmarks.utils.results import RESULTS, ROOT, Results, Row, environment
from benchmarks.utils.timing import interleaved, quantile, seconds_of
from cropr_kernels.utils.optional import import_optional

RATE = 8
PATCH = 16
SIDES = range(128, 449, PATCH)  # pixels
MODELS = ("dynamic_img_size", "NaFlexVit")


def crops(count: int) -> list[Tensor]:
    """Crops (3, H, W) of the example photos, normalized, at several scales."""
    image = import_optional("PIL.Image", "viz", "photos")
    generator = random.Random(0)
    paths = sorted((ROOT / "examples" / "photos").glob("*.jpg"))
    photos = []
    for index in range(count):
        height, width = generator.choice(SIDES), generator.choice(SIDES)
        with image.open(paths[index % len(paths)]) as photo:
            share = generator.uniform(0.5, 1.0) * min(photo.width / width, photo.height / height)
            left = generator.uniform(0, photo.width - share * width)
            top = generator.uniform(0, photo.height - share * height)
            box = (left, top, left + share * width, top + share * height)
            pixels = np.array(photo.convert("RGB").resize((width, height), 3, box))
        photos.append((torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - 0.5) / 0.5)
    return photos


def create(name: str, data: Path) -> Any:
    """The pretrained model in one of its two forms."""
    timm = import_optional("timm", "timm", "models of any size")
    safetensors = import_optional("safetensors.torch", "timm", "weights")
    weights = {key: value.float() for key, value in safetensors.load_file(data / WEIGHTS).items()}
    options = {"use_naflex": True} if name == "NaFlexVit" else {"dynamic_img_size": True}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=200, **options)
    if name == "NaFlexVit":
        weights = timm.models.naflexvit.checkpoint_filter_fn(weights, model)
    model.load_state_dict(weights)
    return model.eval()


def patches_of(photos: list[Tensor]) -> dict[str, Tensor]:
    """The padded inputs of a NaFlexVit."""
    patches, places = [], []
    for photo in photos:
        cells = photo.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # (C, rows, columns, P, P)
        patches.append(cells.permute(1, 2, 3, 4, 0).flatten(2).flatten(0, 1))
        rows, columns = cells.shape[1:3]
        places.append(torch.cartesian_prod(torch.arange(rows), torch.arange(columns)))
    valid = [torch.ones(len(place), dtype=torch.bool) for place in places]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return {"patches": pad(patches), "patch_coord": pad(places), "patch_valid": pad(valid)}


def methods_of(name: str, data: Path, photos: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """Calls that return the logits of all photos."""
    plain = create(name, data)
    model = cropr.apply(create(name, data), rate=RATE, merge=True, num_outputs=0)
    cropr.calibrate(model, read_photos(data / DATA["Imagenette"], TRAIN, 128, 0)[0])
    merging = cropr.deploy(model)
    unpruned = cropr.set_rate(cropr.deploy(model), 0)
    inputs: Any = photos
    padded: Any = cropr.pad_images(photos)[0]
    if name == "NaFlexVit":
        inputs = padded = patches_of(photos)
    return {
        "padded": lambda: plain(padded),
        "one by one": lambda: torch.cat([plain(photo[None]) for photo in photos]),
        "list": lambda: torch.cat(cropr.forward_images(unpruned, inputs)),
        "list, merging": lambda: torch.cat(cropr.forward_images(merging, inputs)),
        "merging, one by one": lambda: torch.cat(
            [cropr.forward_images(merging, [photo])[0] for photo in photos]
        ),
    }


def check(name: str, methods: dict[str, Callable[[], Any]]) -> float:
    """Refuse to time a wrong result; return the agreement of merging with the unpruned model.

    Raises:
        RuntimeError: photos in a batch have other logits than one by one.
    """
    pairs = [("list", "one by one"), ("list, merging", "merging, one by one")]
    if name == "NaFlexVit":
        pairs.append(("padded", "one by one"))
    for method, expected in pairs:
        error = relative_difference(methods[method](), methods[expected]())
        if not error < 1e-4:
            raise RuntimeError(f"{name}: {method} differs from {expected} by {error:.1e}")
    merged, plain = methods["list, merging"](), methods["list"]()
    return (merged.argmax(1) == plain.argmax(1)).float().mean().item()


@torch.inference_mode()
def measure(name: str, data: Path, photos: list[Tensor], rounds: int) -> Row:
    """Images a second of each method over those of `padded`."""
    methods = methods_of(name, data, photos)
    agreement = check(name, methods)

    def timed(method: Callable[[], Any]) -> float:
        return seconds_of(lambda x: method(), photos[0])

    calls = {key: partial(timed, method) for key, method in methods.items()}
    interleaved(calls, 1)
    times = interleaved(calls, rounds)
    ratios: dict[str, list[float]] = {}
    for key, seconds in times.items():
        speeds = [padded / other for padded, other in zip(times["padded"], seconds)]
        ratios[key] = [round(quantile(speeds, q), 3) for q in (0.5, 0.1, 0.9)]
    tokens = [photo.shape[1] * photo.shape[2] // PATCH**2 for photo in photos]
    return {
        "model": name,
        "photos": len(photos),
        "patches": [min(tokens), round(sum(tokens) / len(tokens)), max(tokens)],
        "images/s": ratios,  # over padded: median, 10th and 90th percentile
        "agreement": round(agreement, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "image_lists.json")
    options = parser.parse_args()
    photos = crops(options.photos)
    results = Results(options.out, environment("cpu"))
    for name in MODELS:
        row = measure(name, options.data, photos, options.rounds)
        results.add(row)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
