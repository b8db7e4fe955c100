"""Pictures of what was pruned when."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def find_photos(folder: Path) -> list[Path]:
    """Photos in a folder and all folders below it, by their suffix, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES)


def find_named_photos(paths: list[Path]) -> list[Path]:
    """The photos that are named, and those of the folders that are.

    Raises:
        FileNotFoundError: something that is named is not there.
        ValueError: there is no photo at all.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += find_photos(path)
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"there is no photo or folder {path}")
    if not found:
        raise ValueError(f"no photos ({', '.join(sorted(PHOTO_SUFFIXES))}) in {', '.join(map(str, paths))}")
    return found


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("cropr_kernels.utils.viz needs matplotlib: pip install 'cropr_kernels[viz]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("cropr_kernels.utils.viz needs pillow: pip install 'cropr_kernels[viz]'") from error
    return Image


def save_pruning_maps(path: Any, images: Tensor, maps: Tensor, depth: int, titles: list[str] | None = None) -> None:
    """Write one PNG: each image above its pruning map laid over it.

    Args:
        path: file to write.
        images: (B, C, H, W), C = 1 or 3, values in [0, 1].
        maps: (B, grid height, grid width) from `pruning_map`: the number of blocks each patch went through.
        depth: blocks of the network; a patch that holds this number was never pruned.
        titles: one line above each image.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the batch sizes differ.
    """
    if len(images) != len(maps):
        raise ValueError(f"save_pruning_maps: images and maps must have one batch size, got {len(images)}, {len(maps)}")
    plt = _pyplot()
    count = len(images)
    figure, axes = plt.subplots(2, count, figsize=(1.9 * count + 0.9, 4.2), squeeze=False, layout="constrained")
    height, width = images.shape[2:]
    picture = None
    for column in range(count):
        pixels = images[column].permute(1, 2, 0).clamp(0, 1).cpu()
        for row in range(2):
            axis = axes[row][column]
            axis.set_axis_off()
            axis.imshow(pixels.expand(-1, -1, 3), extent=(0, width, height, 0))
        if titles:
            axes[0][column].set_title(titles[column], fontsize=8)
        picture = axes[1][column].imshow(
            maps[column].cpu(), extent=(0, width, height, 0), cmap="viridis", vmin=1, vmax=depth, alpha=0.7
        )
    bar = figure.colorbar(picture, ax=axes[1].tolist(), ticks=[1, depth], shrink=0.9)
    bar.set_ticklabels(["left after block 1", "never pruned"])
    figure.savefig(path, dpi=130)
    plt.close(figure)


def save_pruning_frames(animation: Any, strip: Any, image: Tensor, left: Tensor, depth: int) -> None:
    """Write an animation (GIF) and a strip (PNG) of one photo: behind each block, what is left of it.

    Args:
        animation, strip: files to write; the animation starts with the whole photo.
        image: (C, H, W), C = 1 or 3, values in [0, 1].
        left: (grid height, grid width) from `pruning_map`.
        depth: blocks of the network.

    Raises:
        ImportError: Pillow is not installed.
    """
    Image = _pillow()
    height, width = image.shape[1:]
    pixels = image.clamp(0, 1).expand(3, -1, -1).cpu()
    grey = 0.15 * pixels.mean(0, keepdim=True).expand(3, -1, -1) + 0.85
    frames = []
    for block in range(depth):  # a patch that left behind block l is gone from then on
        gone = (left.cpu() <= block).repeat_interleave(height // left.shape[0], 0)
        gone = gone.repeat_interleave(width // left.shape[1], 1)
        shown = (torch.where(gone, grey, pixels) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
        frames.append(Image.frombytes("RGB", (width, height), bytes(shown.flatten().tolist())))
    frames[0].save(
        animation, save_all=True, append_images=frames[1:], duration=[800, *[250] * (depth - 2), 1500], loop=0
    )
    columns = min(depth, 6)
    sheet = Image.new("RGB", (columns * width, -(-depth // columns) * height), "white")
    for block, frame in enumerate(frames):
        sheet.paste(frame, (block % columns * width, block // columns * height))
    sheet.save(strip)


def save_merge_maps(path: Any, images: Tensor, maps: Tensor, titles: list[str] | None = None) -> None:
    """Write one PNG: each image above its tokens, every patch in the mean colour of the token that it ended in.

    Lines run between patches of different tokens: what looks like one tile is one token.

    Args:
        path: file to write.
        images: (B, C, H, W), C = 1 or 3, values in [0, 1].
        maps: (B, grid height, grid width) from `merge_map`: patches with one number are one token.
        titles: one line above each image.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the batch sizes differ.
    """
    if len(images) != len(maps):
        raise ValueError(f"save_merge_maps: images and maps must have one batch size, got {len(images)}, {len(maps)}")
    plt = _pyplot()
    count, grid = len(images), (maps.shape[1], maps.shape[2])
    figure, axes = plt.subplots(2, count, figsize=(1.9 * count, 4.2), squeeze=False, layout="constrained")
    patches = torch.nn.functional.adaptive_avg_pool2d(images.float(), grid).flatten(2).cpu()
    for column in range(count):
        labels = maps[column].flatten().cpu()
        tokens = int(labels.max()) + 1
        sums = patches.new_zeros(patches.shape[1], tokens).index_add_(1, labels, patches[column])
        colours = (sums / labels.bincount(minlength=tokens).clamp_min(1))[:, labels]
        tiles = colours.unflatten(1, grid).permute(1, 2, 0).clamp(0, 1).expand(-1, -1, 3)
        pixels = images[column].permute(1, 2, 0).clamp(0, 1).cpu().expand(-1, -1, 3)
        axes[0][column].imshow(pixels)
        axes[1][column].imshow(tiles)
        own = maps[column].cpu()
        for row, col in (own[:, 1:] != own[:, :-1]).nonzero().tolist():
            axes[1][column].plot([col + 0.5] * 2, [row - 0.5, row + 0.5], color="white", linewidth=0.6)
        for row, col in (own[1:] != own[:-1]).nonzero().tolist():
            axes[1][column].plot([col - 0.5, col + 0.5], [row + 0.5] * 2, color="white", linewidth=0.6)
        for row in range(2):
            axes[row][column].set_axis_off()
        if titles:
            axes[0][column].set_title(titles[column], fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def save_curves(path: Any, lines: list[dict[str, Any]], metric: str) -> None:
    """Write one PNG of a training run: losses, the metric, and what every auxiliary head reaches at the end.

    Args:
        path: file to write.
        lines: of metrics.jsonl (`cropr_kernels.train`).
        metric: the name of the metric in its evaluations, such as "top-1".

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = _pyplot()
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "val" in line]
    aux = next((line["val"]["aux"] for line in reversed(evaluations) if "aux" in line["val"]), None)
    figure, axes = plt.subplots(1, 2 if aux is None else 3, figsize=(7 if aux is None else 10, 3), layout="constrained")
    for name in ("main", "aux"):
        values = [line[name] for line in steps]
        if any(values):
            axes[0].plot([line["epoch"] for line in steps], values, label=f"{name} loss")
    axes[0].set_yscale("log")
    axes[0].legend()
    axes[1].plot([line["epoch"] for line in evaluations], [line["val"][metric] for line in evaluations], marker="o")
    axes[1].set_ylabel(f"{metric}, %")
    for axis in axes[:2]:
        axis.set_xlabel("epoch")
    if aux is not None:
        axes[2].bar(range(1, len(aux) + 1), aux)
        axes[2].set_xlabel("after block")
        axes[2].set_ylabel(f"{metric} of the auxiliary head, %")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def save_speed_curves(path: Any, rows: list[dict[str, Any]], title: str) -> None:
    """Write one PNG: the speed-up at every rate, a line per batch size, beside the ratio of FLOPs.

    Args:
        path: file to write.
        rows: of `cropr bench`: batch, rate, speedup, flop_ratio.
        title: one line above.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for batch in dict.fromkeys(row["batch"] for row in rows):
        own = [row for row in rows if row["batch"] == batch]
        axis.plot([row["rate"] for row in own], [row["speedup"] for row in own], marker="o", label=f"batch {batch}")
    axis.plot([row["rate"] for row in own], [row["flop_ratio"] for row in own], "k--", label="FLOPs")
    axis.set_xlabel("tokens dropped after each block")
    axis.set_ylabel("times as fast as unpruned")
    axis.set_title(title, fontsize=9)
    axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def load_photo(path: Any, size: int = 224) -> Tensor:
    """Read a photo, resize its shorter side to 8/7 of `size`, crop the centre: (3, size, size) in [0, 1].

    Raises:
        ImportError: Pillow is not installed.
        FileNotFoundError, PIL.UnidentifiedImageError: the file is missing or no image.
    """
    Image = _pillow()
    with Image.open(path) as file:
        image = file.convert("RGB")
    shorter = round(size * 8 / 7)
    scale = shorter / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3)
    return pixels.permute(2, 0, 1).float() / 255
