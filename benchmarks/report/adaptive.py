"""The section of docs/comparison.md, and the CSV file, about counts of tokens by image."""

from typing import Any

from benchmarks.report.render import (
    NOT_MEASURED,
    Cell,
    Files,
    Sections,
    Table,
    link,
    load,
    mean,
    source,
    spread,
    unique,
    where,
)

# Column -> key and digits
FIGURES = {
    "agreement, %": ("agreement", 1),
    "KL": ("KL", 4),
    "KL, median": ("KL median", 4),
    "KL, 95th percentile": ("KL 95th", 3),
    "features": ("features", 3),
    "mean rate": ("mean rate", 2),
    "FLOPs over constant": ("FLOPs over constant", 4),
    "FLOPs, 95th percentile over mean": ("FLOPs 95th over mean", 3),
}


def table() -> Table | None:
    """Figures of every method at every rate, by data set."""
    measured = load("adaptive")
    if measured is None:
        return None
    rows = measured[1]
    data = unique(rows, "data")
    body: list[list[Cell]] = []
    for rate in sorted(unique(rows, "rate")):
        for method in unique(rows, "method"):
            cells = [where(rows, rate=rate, method=method, data=name) for name in data]
            if not all(cells):
                continue
            line: list[Cell] = [str(rate), method, str(len(cells[0]))]
            for cell in cells:
                line += [spread(cell, key, digits) for key, digits in FIGURES.values()]
            body.append(line)
    head = [f"{name}, {figure}" for name in data for figure in FIGURES]
    return Table(["R", "counts", "seeds", *head], body)


def changes(rows: list[dict[str, Any]], data: str, rate: int) -> str:
    """KL, its 95th percentile and agreement by thresholds, against constant counts."""
    constant, adaptive = (
        where(rows, rate=rate, method=method, data=data) for method in ("constant", "thresholds")
    )
    ratios = [mean(adaptive, key) / mean(constant, key) - 1 for key in ("KL", "KL 95th")]
    points = mean(adaptive, "agreement") - mean(constant, "agreement")
    return ", ".join([*(f"{100 * ratio:+.0f}" for ratio in ratios), f"{points:+.1f}"])


def section() -> str:
    """Thresholds against constant counts at equal mean FLOPs, and how they were measured."""
    measured = load("adaptive")
    if measured is None:
        return NOT_MEASURED
    env, rows = measured
    by_thresholds = where(rows, method="thresholds")
    ratios = [row["FLOPs over constant"] for row in by_thresholds]
    note = (
        "KL and its 95th percentile in %, points of agreement. ViT-Ti/16, "
        f"{len(unique(by_thresholds, 'seed'))} seeds, {env['photos']} photos each; mean "
        f"FLOPs {min(ratios):.3f} to {max(ratios):.3f} times the constant rate's. "
        f"{source('adaptive', env)}. Every figure: {link('adaptive', table())}."
    )
    data = unique(rows, "data")
    body: list[list[Cell]] = [
        [str(rate), *(changes(rows, name, rate) for name in data)]
        for rate in sorted(unique(rows, "rate"))
    ]
    return f"{Table(['R', *data], body).markdown()}\n\n{note}"


SECTIONS: Sections = {"adaptive": section}
FILES: Files = {"adaptive": table}
