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
    "images/s over constant": ("images/s over constant", 3),
    "FLOPs over constant": ("FLOPs over constant", 4),
    "FLOPs, 95th percentile over mean": ("FLOPs 95th over mean", 3),
}


METHODS_SHOWN = ("ATM", "AdaMerge", "ATS", "Token Transforming")
RATE = 8  # of other methods in the page


def rows_of(*names: str) -> list[dict[str, Any]]:
    """Rows of the files that are there."""
    files = [load(name) for name in names]
    return [row for measured in files if measured is not None for row in measured[1]]


def rows_of_all() -> list[dict[str, Any]]:
    """Rows of budgets, of other methods, and at equal time."""
    rows = rows_of("adaptive", "adaptive_budgets", "adaptive_rivals")
    timed = [row | {"method": timed_method(row["batch"])} for row in rows_of("adaptive_speed")]
    return rows + timed


def timed_method(batch: int) -> str:
    return f"equal images/s, batch {batch}"


def table() -> Table | None:
    """Figures of every method at every rate, by data set."""
    rows = rows_of_all()
    if not rows:
        return None
    data = unique(rows, "data")
    body: list[list[Cell]] = []
    for rate in sorted(unique(rows, "rate")):
        for method in unique(rows, "method"):
            cells = [where(rows, rate=rate, method=method, data=name) for name in data]
            if not all(cells):
                continue
            line: list[Cell] = [str(rate), method, str(min(len(cell) for cell in cells))]
            for cell in cells:
                line += [figure(cell, key, digits) for key, digits in FIGURES.values()]
            body.append(line)
    head = [f"{name}, {figure}" for name in data for figure in FIGURES]
    return Table(["R", "counts", "seeds", *head], body)


def figure(rows: list[dict[str, Any]], key: str, digits: int) -> Cell:
    """A figure and its range; none where a method lacks it."""
    return spread(rows, key, digits) if all(key in row for row in rows) else "-"


def changes(
    rows: list[dict[str, Any]], data: str, rate: int, method: str, reference: str = "constant"
) -> str:
    """KL, its 95th percentile and agreement of a method, against another on the same photos."""
    changed = where(rows, rate=rate, method=method, data=data)
    if not changed:
        return "-"
    seeds = unique(changed, "seed")
    same = where(rows, rate=rate, method=reference, data=data)
    before = [row for row in same if row["seed"] in seeds]
    ratios = [mean(changed, key) / mean(before, key) - 1 for key in ("KL", "KL 95th")]
    points = mean(changed, "agreement") - mean(before, "agreement")
    return ", ".join([*(f"{100 * ratio:+.0f}" for ratio in ratios), f"{points:+.1f}"])


def section() -> str:
    """Thresholds and other methods against constant counts, and how they were measured."""
    measured = load("adaptive")
    if measured is None:
        return NOT_MEASURED
    env = measured[0]
    rows = rows_of_all()
    by_thresholds = where(rows, method="thresholds")
    ratios = [row["FLOPs over constant"] for row in rows if "batch" not in row]
    note = (
        "KL and its 95th percentile in %, points of agreement. ViT-Ti/16, "
        f"{len(unique(by_thresholds, 'seed'))} seeds, {env['photos']} photos "
        f"each; mean FLOPs {min(ratios):.3f} to {max(ratios):.3f} times the constant rate's. "
        f"Every figure: {link('adaptive', table())}."
    )
    data = unique(rows, "data")
    shown = [(rate, "thresholds") for rate in sorted(unique(by_thresholds, "rate"))]
    shown += [(RATE, method) for method in METHODS_SHOWN]
    body: list[list[Cell]] = [
        [
            str(rate) if method == "thresholds" else f"{rate}, {method}",
            *(changes(rows, name, rate, method) for name in data),
        ]
        for rate, method in shown
    ]
    lines = [Table(["R", *data], body).markdown(), "", note, *budgets(rows, data)]
    return "\n".join(lines)


def budgets(rows: list[dict[str, Any]], data: list[str]) -> list[str]:
    """A line on equal time, and on each budget that gained nothing, where they were measured."""
    lines = []
    batches = sorted(unique(rows_of("adaptive_speed"), "batch"))
    if batches:
        timed = (
            ", ".join(f"({changes(rows, name, RATE, timed_method(batch))})" for name in data)
            for batch in batches
        )
        lines.append(
            f"- R = {RATE} at equal images/s (one thread), batch "
            f"{', '.join(str(batch) for batch in batches)}: {'; '.join(timed)}."
        )
    padded = where(rows, rate=RATE, method="capacity of 32")
    if padded:
        change = " and ".join(changes(rows, name, RATE, "capacity of 32") for name in data)
        share = 100 * max(row["overflows"] for row in padded)
        lines.append(
            f"- Batches of 32 padded to 1.05 times the mean rows, for static shapes: {change}; "
            f"{share:.0f} % have more."
        )
    if where(rows, rate=RATE, method="dropping by thresholds"):
        change = " and ".join(
            changes(rows, name, RATE, "dropping by thresholds", "dropping") for name in data
        )
        lines.append(f"- Dropping by thresholds of scores, against equal counts: {change}.")
    return ["", *lines] if lines else []


SECTIONS: Sections = {"adaptive": section}
FILES: Files = {"adaptive": table}
