"""Figures: pruning maps, merged tokens, speed and training curves.

All raise ImportError if matplotlib or Pillow is not installed.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .io import atomic_write
from .optional import import_optional

CAPTION = 16  # pixels above a frame


def _to_pictures(images: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Make pictures (B, C, H, W) of videos and spectrograms, with maps (B, height, width) of them.

    Of a video the frames stand beside each other, the first one of each that has patches; of a
    spectrogram time runs from left to right.
    """
    if images.ndim == 5:
        count = maps.shape[1]
        frames = images[:, :: images.shape[1] // count][:, :count]
        return frames.permute(0, 2, 3, 1, 4).flatten(3), maps.transpose(1, 2).flatten(2)
    return (images.transpose(1, 2).unsqueeze(1), maps) if images.ndim == 3 else (images, maps)


def _figure(width: float, height: float) -> Any:
    return import_optional("matplotlib.figure", "viz", "a picture").Figure(
        figsize=(width, height), layout="constrained"
    )


def _save(figure: Any, path: str | Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _pixels(image: Tensor) -> Tensor:
    """Convert an image (1 or 3, H, W) to (H, W, 3)."""
    return image.permute(1, 2, 0).clamp(0, 1).cpu().expand(-1, -1, 3)


def _two_rows(
    images: Tensor, maps: Tensor, titles: list[str] | None, margin: float
) -> tuple[Any, Any]:
    """Draw images in the upper row of a figure; return it and its axes (2, B)."""
    if len(images) != len(maps):
        raise ValueError(
            f"pictures: images and maps must have one batch size, got {len(images)}, {len(maps)}"
        )
    height, width = images.shape[2:]
    # A photo has 1.9 inches
    scale = max(width / height, 1.0)
    figure = _figure(1.9 * scale * len(images) + margin, 4.2)
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
    """Write one PNG: each image with its title, and below it with its pruning map.

    Images are (B, C, H, W), C = 1 or 3, in [0, 1], videos (B, frames, C, H, W), whose frames are
    drawn beside each other, or spectrograms (B, time, frequencies); maps are those of
    `pruning_map`: the number of blocks each patch passed, `depth` if it was never pruned. Raises
    ValueError if the batch sizes differ.
    """
    images, maps = _to_pictures(images, maps)
    figure, axes = _two_rows(images, maps, titles, margin=0.9)
    extent = (-0.5, images.shape[3] - 0.5, images.shape[2] - 0.5, -0.5)
    for axis, image, pruning_map in zip(axes[1], images, maps):
        axis.imshow(_pixels(image))
        overlay = axis.imshow(
            pruning_map.cpu(), extent=extent, cmap="viridis", vmin=1, vmax=depth, alpha=0.7
        )
    bar = figure.colorbar(overlay, ax=axes[1].tolist(), ticks=[1, depth], shrink=0.9)
    bar.set_ticklabels(["pruned after block 1", "never pruned"])
    _save(figure, path)


def save_merge_maps(
    path: str | Path, images: Tensor, maps: Tensor, titles: list[str] | None = None
) -> None:
    """Write one PNG: each image above its tokens, every patch in the mean color of its token.

    Lines separate patches of different tokens. Arguments as in `save_pruning_maps`, with maps from
    `merge_map`: patches of one number are one token.
    """
    images, maps = _to_pictures(images, maps)
    figure, axes = _two_rows(images, maps, titles, margin=0.0)
    for axis, image, token_map in zip(axes[1], images, maps.cpu()):
        axis.imshow(_pixels(tile_colors(image, token_map)))
        for row, col in (token_map[:, 1:] != token_map[:, :-1]).nonzero().tolist():
            axis.plot([col + 0.5] * 2, [row - 0.5, row + 0.5], color="white", linewidth=0.6)
        for row, col in (token_map[1:] != token_map[:-1]).nonzero().tolist():
            axis.plot([col - 0.5, col + 0.5], [row + 0.5] * 2, color="white", linewidth=0.6)
    _save(figure, path)


def tile_colors(image: Tensor, token_map: Tensor) -> Tensor:
    """Mean color of the token of each patch, (C, grid height, grid width); white if it was dropped.

    The image is (C, H, W) in [0, 1]; token_map (grid height, grid width) is its `merge_map`, with
    -1 for dropped patches.
    """
    grid = (token_map.shape[0], token_map.shape[1])
    colors = F.adaptive_avg_pool2d(image.float().cpu(), grid).flatten(1)
    labels = token_map.flatten() + 1
    sums = colors.new_zeros(len(colors), int(labels.max()) + 1).index_add_(1, labels, colors)
    means = sums / labels.bincount().clamp_min(1)
    means[:, 0] = 1.0
    return means[:, labels].unflatten(1, grid)


def save_pruning_frames(
    animation: str | Path, strip: str | Path, image: Tensor, pruned_after: Tensor, depth: int
) -> None:
    """Write an animation (GIF) and a strip (PNG) of the patches that each block sees.

    Captions name the block and its number of patches. The image is (C, H, W), C = 1 or 3, in [0,
    1], a video (frames, C, H, W) or a spectrogram (time, frequencies); pruned_after is its
    `pruning_map`.
    """
    image, pruned_after = (
        part[0] for part in _to_pictures(image.unsqueeze(0), pruned_after.unsqueeze(0))
    )
    Image = import_optional("PIL.Image", "viz", "a picture")
    ImageDraw = import_optional("PIL.ImageDraw", "viz", "a picture")
    height, width = image.shape[1:]
    pixels = _pixels(image)
    gray = 0.15 * pixels.mean(2, keepdim=True) + 0.85
    blocks = F.interpolate(pruned_after[None, None].float().cpu(), (height, width))[
        0, 0, :, :, None
    ]
    frames = []
    for block in range(depth):
        frame_pixels = (torch.where(blocks <= block, gray, pixels) * 255).round().to(torch.uint8)
        frame = Image.new("RGB", (width, height + CAPTION), "white")
        frame.paste(
            Image.frombytes("RGB", (width, height), frame_pixels.numpy().tobytes()), (0, CAPTION)
        )
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
    """Write one PNG of a training run: losses, the metric, and its last value for every auxiliary
    head.

    `lines` are those of metrics.jsonl (`cropr_kernels.train`), `metric` a name in its evaluations,
    such as "top-1".
    """
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "val" in line]
    aux = next((line["val"]["aux"] for line in reversed(evaluations) if "aux" in line["val"]), None)
    figure = _figure(7 if aux is None else 10, 3)
    axes = figure.subplots(1, 2 if aux is None else 3)
    marker = ".-" if len(steps) <= 50 else "-"  # a line needs two points
    for name in ("main", "aux"):
        values = [line[name] for line in steps]
        if any(values):
            axes[0].plot([line["epoch"] for line in steps], values, marker, label=f"{name} loss")
    axes[0].set(yscale="log", xlabel="epoch")
    axes[0].legend()
    axes[1].plot(
        [line["epoch"] for line in evaluations],
        [line["val"][metric] for line in evaluations],
        marker="o",
    )
    axes[1].set(xlabel="epoch", ylabel=f"{metric}, %")
    if aux is not None:
        axes[2].bar(range(1, len(aux) + 1), aux)
        axes[2].set(xlabel="after block", ylabel=f"{metric} of the auxiliary head, %")
    _save(figure, path)


def save_speed_curves(path: str | Path, rows: list[dict[str, float]], title: str) -> None:
    """Write one PNG: the speed-up at every rate, a line per batch size, and the ratio of FLOPs.

    `rows` are those of `cropr bench`: batch, rate, speedup, flop_ratio.
    """
    figure = _figure(5, 3.4)
    axis = figure.subplots()
    for batch in dict.fromkeys(row["batch"] for row in rows):
        batch_rows = [row for row in rows if row["batch"] == batch]
        rates = [row["rate"] for row in batch_rows]
        axis.plot(rates, [row["speedup"] for row in batch_rows], marker="o", label=f"batch {batch}")
    axis.plot(rates, [row["flop_ratio"] for row in batch_rows], "k--", label="FLOPs")
    axis.set(xlabel="tokens pruned after each block", ylabel="times as fast as unpruned")
    axis.set_title(title, fontsize=9)
    axis.legend()
    _save(figure, path)
