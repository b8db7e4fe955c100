"""Plots: matplotlib without a display, labels without overlaps, and latency curves."""

import itertools
from pathlib import Path
from typing import Any

from benchmarks.utils.results import Row


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def label_points(axis: Any, points: list[tuple[float, float, str]]) -> None:
    """Label points (x, y, text) without overlaps; the axis must have its final limits."""
    figure = axis.figure
    figure.draw_without_rendering()
    occupied = [axis.transData.transform((x, y)) for x, y, _ in points]
    boxes: list[Any] = []
    directions = [(dx, dy) for dx, dy in itertools.product((1, -1, 0), (0, 1, -1)) if dx or dy]
    sides = [
        (dx * distance, dy * distance)
        for distance, (dx, dy) in itertools.product((6, 12, 20, 30), directions)
    ]
    for x, y, text in points:
        for dx, dy in sides:
            align = {"ha": "left" if dx > 0 else "right" if dx < 0 else "center",
                     "va": "bottom" if dy > 0 else "top" if dy < 0 else "center"}  # fmt: skip
            line = (
                {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6}
                if max(abs(dx), abs(dy)) > 12
                else None
            )
            label = axis.annotate(
                text,
                (x, y),
                xytext=(dx, dy),
                textcoords="offset points",
                fontsize=7,
                arrowprops=line,
                **align,
            )
            box = label.get_window_extent()
            inside = (
                axis.bbox.x0 < box.x0
                and box.x1 < axis.bbox.x1
                and axis.bbox.y0 < box.y0
                and box.y1 < axis.bbox.y1
            )
            free = not any(box.padded(1).overlaps(placed) for placed in boxes)
            if inside and free and not any(box.padded(4).contains(*point) for point in occupied):
                boxes.append(box)
                break
            label.remove()
        else:
            raise RuntimeError(f"no room for the label {text!r}: draw a larger picture")


def plot_latency_curve(path: Path, rows: list[Row], env: dict[str, Any]) -> None:
    """Plot rows with numbers of tokens and the time relative to the longest sequence."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    axis.step([row["tokens"] for row in rows], [row["relative"] for row in rows], where="mid")
    axis.set_xlabel("tokens")
    axis.set_ylabel("time of a block (longest = 1)")
    axis.set_title(
        f"{env['model']}, batch {env['batch']}, {env['dtype']}, {env['device']}", fontsize=9
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
