"""The section, picture and CSV file of docs/comparison.md about pretrained networks without
training."""

import statistics
from typing import Any

from benchmarks.baselines.registry import BASELINES, OFF_THE_SHELF
from benchmarks.report.render import (
    NOT_MEASURED,
    Cell,
    Files,
    Sections,
    Table,
    link,
    load,
    mean,
    measured_on,
    source,
    spread,
    unique,
    where,
)
from benchmarks.utils.plots import pyplot
from benchmarks.utils.results import DOCS

METHODS = (*OFF_THE_SHELF, "calibrated", "merge")
FAR_BELOW = ("ATS", "pixel variance")  # the others: not plotted
VARIANTS = tuple(baseline.name for baseline in BASELINES if baseline.variant)
PLOTTED = tuple(name for name in METHODS if name not in (*VARIANTS, *FAR_BELOW))
LABELS = {"calibrated": "Cropr, dropping", "merge": "**Cropr, merging**"}


def speeds() -> dict[tuple[int, str], float]:
    """Speed-up by rate and method."""
    timed = load("off_the_shelf_speed")
    return (
        {} if timed is None else {(row["rate"], row["method"]): row["speed-up"] for row in timed[1]}
    )


def table() -> Table | None:
    """Agreement and KL by data set, with the speed measured apart."""
    measured = load("off_the_shelf")
    if measured is None:
        return None
    rows, speed = measured[1], speeds()
    data = unique(rows, "data")
    labelled = {row["data"] for row in rows if "top-1" in row}
    body: list[list[Cell]] = []
    for rate in sorted(unique(rows, "rate")):
        for method in METHODS:
            cells = where(rows, rate=rate, method=method)
            if not cells:
                continue
            line: list[Cell] = [str(rate), LABELS.get(method, method)]
            for name in data:
                cell = where(cells, data=name)
                line += [spread(cell, "agreement", 1), spread(cell, "KL", 3)]
                if name in labelled:
                    line.append(
                        f"{mean(cell, 'top-1'):.1f}" if all("top-1" in row for row in cell) else "-"
                    )
            body.append([*line, f"{speed[rate, method]:.2f}x" if (rate, method) in speed else "-"])
    head = ["R", "method"]
    for name in data:
        head += [
            f"{name}, {figure}"
            for figure in ("agreement, %", "KL", "top-1, %")[: 3 if name in labelled else 2]
        ]
    return Table([*head, "speed-up"], body)


def off_the_shelf() -> str:
    """A link to the figures, and how they were measured."""
    measured, timed = load("off_the_shelf"), load("off_the_shelf_speed")
    if measured is None:
        return NOT_MEASURED
    env, rows = measured
    merging = where(rows, method="merge")
    unpruned = mean([row for row in merging if "top-1" in row], "top-1 unpruned")
    note = (
        f"All figures: {link('off_the_shelf', table())}. ViT-Ti/16 at 224 px, unpruned top-1 "
        f"{unpruned:.1f} %; "
        f"{len(unique(merging, 'seed'))} seeds, each with {env['photos']} photos to calibrate on "
        "and as many others; "
        f"mean, and range over seeds. {source('off_the_shelf', env)}."
    )
    if timed is not None:
        note += (
            f" Speed-up over no pruning on the engine: batch {timed[0]['batch']}, float32, "
            f"{measured_on(timed[0])}."
        )
    return note


def plot() -> None:
    """Agreement against measured speed-up, one panel a data set, one line a method over its rates;
    dashed: drops."""
    measured, timed = load("off_the_shelf"), load("off_the_shelf_speed")
    if measured is None or timed is None:
        return
    plt = pyplot()
    rows, speed = measured[1], speeds()
    data = unique(rows, "data")
    figure, axes = plt.subplots(
        1, len(data), figsize=(5.2 * len(data), 3.8), layout="constrained", squeeze=False
    )
    styles = line_styles()
    for axis, name in zip(axes[0], data):
        for method in PLOTTED:
            points = []
            for rate in sorted(unique(rows, "rate")):
                cell = where(rows, data=name, rate=rate, method=method)
                if cell and (rate, method) in speed:
                    points.append((speed[rate, method], mean(cell, "agreement")))
            if points:
                label = LABELS.get(method, method).strip("*")
                axis.plot(*zip(*points), marker="o", markersize=4, label=label, **styles[method])
        axis.set_title(f"{name} (dashed: drops tokens)", fontsize=10)
        axis.set_xlabel("speed-up, measured")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("agreement with the unpruned model, %")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(f"ViT-Ti/16, no training; speed: {measured_on(timed[0])}", fontsize=9)
    figure.savefig(DOCS / "off_the_shelf.png", dpi=130)
    plt.close(figure)


def line_styles() -> dict[str, dict[str, Any]]:
    """Red for Cropr; dashed for what drops tokens, drawn through for what merges them."""
    styles: dict[str, dict[str, Any]] = {
        "calibrated": {"color": "C3", "linestyle": "--", "linewidth": 2.4}
    }
    styles["merge"] = {"color": "C3", "linewidth": 2.4}
    colors = [f"C{i}" for i in range(10) if i != 3]
    dropping = [
        baseline.name
        for baseline in BASELINES
        if baseline.category == "pruning" and baseline.name in PLOTTED
    ]
    merging = [name for name in PLOTTED if name not in (*dropping, *styles)]
    for names, line in ((dropping, "--"), (merging, "-")):
        styles |= {name: {"color": color, "linestyle": line} for name, color in zip(names, colors)}
    return styles


def means(method: str, rate: int) -> tuple[list[float], float | None]:
    """Agreement of a method at a rate, by data set, and its speed-up."""
    measured = load("off_the_shelf")
    rows = [] if measured is None else where(measured[1], rate=rate, method=method)
    agreement = [
        statistics.mean(row["agreement"] for row in where(rows, data=name))
        for name in unique(rows, "data")
    ]
    return agreement, speeds().get((rate, method))


SECTIONS: Sections = {"off_the_shelf": off_the_shelf}
FILES: Files = {"off_the_shelf": table}
