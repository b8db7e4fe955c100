"""The section of docs/comparison.md about maps of a pretrained network with a dense head."""

import statistics
from typing import Any

from benchmarks.report.render import Sections, grid, spread, where
from benchmarks.utils.results import load

# Metric, scale and digits, in the order of the columns.
FIGURES = {"error, %": ("MAE", 100, 1), "correlation": ("correlation", 1, 3), "IoU, %": ("IoU", 100, 1)}
BASELINES = ("random, LLF", "variance, LLF", "attention top-k, LLF", "ToMe")


def figures(rows: list[dict[str, Any]]) -> list[str]:
    """The metrics of one cell over its seeds."""
    return [spread([scale * row[key] for row in rows], digits) for key, scale, digits in FIGURES.values()]


def saliency() -> str:
    """Every method at every number of FLOPs: how its maps differ from those of the unpruned network."""
    found = load("saliency")
    if found is None:
        return "Not measured yet."
    env, rows = found
    pruned = [row for row in rows if row["flops"] is not None]
    data, body = list(dict.fromkeys(row["data"] for row in rows)), []
    for wanted in sorted({row["flops"] for row in pruned}):
        for method in dict.fromkeys(row["method"] for row in pruned):
            of_method = [row for row in pruned if (row["flops"], row["method"]) == (wanted, method)]
            cells = [[row for row in of_method if row["data"] == name] for name in data]
            if not all(cells):
                continue
            line = [f"{wanted:.1f}x", method if method in BASELINES else f"**{method}**", str(of_method[0]["rate"])]
            body.append(line + [text for own in cells for text in figures(own)])
    head = ["FLOPs fewer", "method", "R", *(f"{name}, {what}" for name in data for what in FIGURES)]
    means = [row for row in rows if row["flops"] is None]
    scale = ", ".join(
        f"{100 * statistics.mean(row['MAE'] for row in means if row['data'] == name):.1f} % ({name})" for name in data
    )
    seeds = len({row["seed"] for row in rows})
    note = (
        f"The network of {env['network']} at 224 px, {env['patches']} patches. FLOPs are those of the backbone; the "
        f"head has {env['head']:.2f} times those of the unpruned one, and stays. Against the unpruned network's maps: "
        "mean absolute error of the saliency (0 to 100 %), Pearson's correlation, IoU of what is above one half. The "
        f"mean map of other photos, in the place of every map, has an error of {scale}. {seeds} seeds, each with "
        f"{env['photos']} photos to calibrate on and as many others to compare on; mean, and range over seeds."
    )
    return grid(head, body) + f"\n\n{note} {where(env)}."


SECTIONS: Sections = {"saliency": saliency}
