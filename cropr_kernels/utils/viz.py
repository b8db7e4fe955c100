"""Pictures: which patches are pruned after which block, which are merged, how fast models are, how training went.

All of them raise ImportError where matplotlib or Pillow is not installed.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .io import atomic_write
from .optional import import_optional

CAPTION = 16  # pixels above a frame


def _figure(width: float, height: float) -> Any:
    return import_optional("matplotlib.figure", "viz", "a picture").Figure(
        figsize=(width, height), layout="constrained"
    )


def _save(figure: Any, path: str | Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _pixels(image: Tensor) -> Tensor:
    """An image (1 or 3, H, W) as (H, W, 3)."""
    return image.permute(1, 2, 0).clamp(0, 1).cpu().expand(-1, -1, 3)


def _two_rows(images: Tensor, maps: Tensor, titles: list[str] | None, margin: float) -> tuple[Any, Any]:
    """A figure with the images in its upper row, and its axes (2, B)."""
    if len(images) != len(maps):
        raise ValueError(f"pictures: images and maps must have one batch size, got {len(images)}, {len(maps)}")
    figure = _figure(1.9 * len(images) + margin, 4.2)
    axes = figure.subplots(2, len(images), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image in zip(axes[0], images):
        axis.imshow(_pixels(image))
    for axis, title in zip(axes[0], titles or ()):
        axis.set_title(title, fontsize=8, parse_math=False)
    return figure, axes


def save_pruning_maps(
    path: str | Path, images: Tensor, maps: Tensor, depth: int, titles: list[str] | None = None
) -> None:
    """Write one PNG: each image, with its title, above its pruning map laid over it.

    Images are (B, C, H, W), C = 1 or 3, in [0, 1]; maps (B, grid height, grid width) from `pruning_map`: the number of
    blocks each patch went through, of `depth` if it was never pruned. ValueError where the batch sizes differ.
    """
    figure, axes = _two_rows(images, maps, titles, margin=0.9)
    extent = (-0.5, images.shape[3] - 0.5, images.shape[2] - 0.5, -0.5)
    for axis, image, own in zip(axes[1], images, maps):
        axis.imshow(_pixels(image))
        shown = axis.imshow(own.cpu(), extent=extent, cmap="viridis", vmin=1, vmax=depth, alpha=0.7)
    bar = figure.colorbar(shown, ax=axes[1].tolist(), ticks=[1, depth], shrink=0.9)
    bar.set_ticklabels(["pruned after block 1", "never pruned"])
    _save(figure, path)


def save_merge_maps(path: str | Path, images: Tensor, maps: Tensor, titles: list[str] | None = None) -> None:
    """Write one PNG: each image above its tokens, every patch in the mean colour of the token that it is part of.

    Lines run between patches of different tokens: what looks like one tile is one token. The arguments are those of
    `save_pruning_maps`, with maps from `merge_map`: patches with one number are one token.
    """
    figure, axes = _two_rows(images, maps, titles, margin=0.0)
    patches = F.adaptive_avg_pool2d(images.float(), (maps.shape[1], maps.shape[2])).flatten(2).cpu()
    for axis, colours, own in zip(axes[1], patches, maps.cpu()):
        labels = own.flatten()
        sums = colours.new_zeros(len(colours), int(labels.max()) + 1).index_add_(1, labels, colours)
        tiles = (sums / labels.bincount().clamp_min(1))[:, labels]
        axis.imshow(_pixels(tiles.unflatten(1, own.shape)))
        for row, col in (own[:, 1:] != own[:, :-1]).nonzero().tolist():
            axis.plot([col + 0.5] * 2, [row - 0.5, row + 0.5], color="white", linewidth=0.6)
        for row, col in (own[1:] != own[:-1]).nonzero().tolist():
            axis.plot([col - 0.5, col + 0.5], [row + 0.5] * 2, color="white", linewidth=0.6)
    _save(figure, path)


def save_pruning_frames(
    animation: str | Path, strip: str | Path, image: Tensor, pruned_after: Tensor, depth: int
) -> None:
    """Write an animation (GIF), from the whole photo on, and a strip (PNG): the patches that each block sees.

    Above each frame stand its block and how many patches it sees. The photo is (C, H, W), C = 1 or 3, in [0, 1];
    pruned_after (grid height, grid width) is its `pruning_map`.
    """
    Image, ImageDraw = (
        import_optional("PIL.Image", "viz", "a picture"),
        import_optional("PIL.ImageDraw", "viz", "a picture"),
    )
    height, width = image.shape[1:]
    pixels = _pixels(image)
    grey = 0.15 * pixels.mean(2, keepdim=True) + 0.85
    blocks = F.interpolate(pruned_after[None, None].float().cpu(), (height, width))[0, 0, :, :, None]
    frames = []
    for block in range(depth):
        shown = (torch.where(blocks <= block, grey, pixels) * 255).round().to(torch.uint8)
        frame = Image.new("RGB", (width, height + CAPTION), "white")
        frame.paste(Image.frombytes("RGB", (width, height), bytes(shown.flatten().tolist())), (0, CAPTION))
        text = f"block {block + 1}: {int((pruned_after > block).sum())} patches"
        ImageDraw.Draw(frame).text((3, 2), text, "black")
        frames.append(frame)
    times = [800, *[250] * (depth - 2), 1500]
    with atomic_write(animation) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=times, loop=0)
    columns = min(depth, 6)
    sheet = Image.new("RGB", (columns * width, -(-depth // columns) * frames[0].height), "white")
    for block, frame in enumerate(frames):
        sheet.paste(frame, (block % columns * width, block // columns * frame.height))
    with atomic_write(strip) as temporary:
        sheet.save(temporary)


def save_curves(path: str | Path, lines: list[dict[str, Any]], metric: str) -> None:
    """Write one PNG of a training run: losses, the metric, and that of every auxiliary head in the end.

    `lines` are those of metrics.jsonl (`cropr_kernels.train`), `metric` a name in its evaluations, such as "top-1".
    """
    steps, evaluations = ([line for line in lines if kind in line] for kind in ("loss", "val"))
    aux = next((line["val"]["aux"] for line in reversed(evaluations) if "aux" in line["val"]), None)
    figure = _figure(7 if aux is None else 10, 3)
    axes = figure.subplots(1, 2 if aux is None else 3)
    marker = ".-" if len(steps) <= 50 else "-"  # a line through one point is none
    for name in ("main", "aux"):
        values = [line[name] for line in steps]
        if any(values):
            axes[0].plot([line["epoch"] for line in steps], values, marker, label=f"{name} loss")
    axes[0].set(yscale="log", xlabel="epoch")
    axes[0].legend()
    axes[1].plot([line["epoch"] for line in evaluations], [line["val"][metric] for line in evaluations], marker="o")
    axes[1].set(xlabel="epoch", ylabel=f"{metric}, %")
    if aux is not None:
        axes[2].bar(range(1, len(aux) + 1), aux)
        axes[2].set(xlabel="after block", ylabel=f"{metric} of the auxiliary head, %")
    _save(figure, path)


def save_speed_curves(path: str | Path, rows: list[dict[str, Any]], title: str) -> None:
    """Write one PNG: the speed-up at every rate, a line per batch size, beside the ratio of FLOPs.

    `rows` are those of `cropr bench`: batch, rate, speedup, flop_ratio.
    """
    figure = _figure(5, 3.4)
    axis = figure.subplots()
    for batch in dict.fromkeys(row["batch"] for row in rows):
        own = [row for row in rows if row["batch"] == batch]
        axis.plot([row["rate"] for row in own], [row["speedup"] for row in own], marker="o", label=f"batch {batch}")
    axis.plot([row["rate"] for row in own], [row["flop_ratio"] for row in own], "k--", label="FLOPs")
    axis.set(xlabel="tokens pruned after each block", ylabel="times as fast as unpruned")
    axis.set_title(title, fontsize=9)
    axis.legend()
    _save(figure, path)
