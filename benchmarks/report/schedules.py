"""The section, picture and CSV files of docs/comparison.md about schedules: agreement and speed of
each."""

import statistics
from typing import Any

from benchmarks.report.render import (
    NOT_MEASURED,
    Cell,
    Files,
    Sections,
    Spread,
    Table,
    link,
    load,
    measured_on,
    spread,
    unique,
    where,
)
from benchmarks.utils.plots import pyplot
from benchmarks.utils.results import DOCS, hashable

PLAIN = "constant"  # the schedule that the others of a group are compared with
DROPPING = "dropping"  # the method of that schedule if it was not measured by theirs
Row = dict[str, Any]
Key = tuple[str, str, tuple[int, ...], str]


def key_of(row: Row, method: str | None = None) -> Key:
    """Group, schedule, counts and method: other counts are another cell."""
    return row["group"], row["schedule"], hashable(row["keep"]), method or row["method"]


def keeps_all(planned: Row) -> bool:
    return len(set(planned["keep"])) == 1


def by_key(rows: list[Row]) -> dict[Key, list[Row]]:
    cells: dict[Key, list[Row]] = {}
    for row in rows:
        cells.setdefault(key_of(row), []).append(row)
    return cells


def gain(rows: list[Row], constant: list[Row], data: str) -> Cell:
    """Points of agreement more than the constant rate of the group, on the same photos."""
    agreement = {row["seed"]: row["agreement"] for row in where(rows, data=data)}
    base = {row["seed"]: row["agreement"] for row in where(constant, data=data)}
    shared = sorted(agreement.keys() & base.keys())
    return Spread([agreement[seed] - base[seed] for seed in shared], 1) if shared else "-"


def table() -> Table | None:
    """A row a schedule and method."""
    planned_schedules, measured, timed = (
        load("schedules_plan"),
        load("schedules"),
        load("schedules_speed"),
    )
    if planned_schedules is None or measured is None:
        return None
    rows = measured[1]
    speed_rows = [] if timed is None else timed[1]
    cells = by_key(rows)
    speeds = by_key(speed_rows)
    constant = {
        row["group"]: hashable(row["keep"]) for row in where(planned_schedules[1], schedule=PLAIN)
    }
    data, batches = unique(rows, "data"), sorted(unique(speed_rows, "batch"))
    body: list[list[Cell]] = []
    for method in unique(rows, "method"):
        for planned in planned_schedules[1]:
            cell = cells.get(key_of(planned, method))
            if cell is None or keeps_all(planned):
                continue
            group, schedule, *_ = key_of(planned, method)
            bases = [
                cells.get((group, PLAIN, constant[group], name)) for name in (method, DROPPING)
            ]
            base = bases[0] or bases[1] or []
            line: list[Cell] = [method, group, schedule, f"{cell[0]['FLOPs']:.2f}x"]
            for name in data:
                of_data = where(cell, data=name)
                more = "-" if schedule == PLAIN else gain(cell, base, name)
                figures = (
                    [spread(of_data, "agreement", 1), more, spread(of_data, "KL", 3)]
                    if of_data
                    else ["-"] * 3
                )
                line += figures
            fast = {
                row["batch"]: row["speed-up"] for row in speeds.get(key_of(planned, method), [])
            }
            body.append(
                [*line, *(f"{fast[batch]:.2f}x" if batch in fast else "-" for batch in batches)]
            )
    head = ["method", "group", "schedule", "FLOPs fewer"]
    for name in data:
        head += [f"{name}, agreement, %", f"{name}, more than constant", f"{name}, KL"]
    return Table([*head, *(f"speed-up, batch {batch}" for batch in batches)], body)


def counts() -> Table | None:
    """Tokens kept by every schedule."""
    planned_schedules = load("schedules_plan")
    if planned_schedules is None:
        return None
    _, rows = planned_schedules
    body: list[list[Cell]] = [
        [row["group"], row["schedule"], " ".join(map(str, row["keep"]))] for row in rows
    ]
    return Table(["group", "schedule", "tokens kept after block 1, 2, ..."], body)


def section() -> str:
    """Links to the figures, and how they were measured."""
    planned_schedules, measured, timed = (
        load("schedules_plan"),
        load("schedules"),
        load("schedules_speed"),
    )
    if planned_schedules is None or measured is None:
        return NOT_MEASURED
    env, rows = measured
    seeds = len(unique(rows, "seed"))
    note = (
        f"All figures: {link('schedules', table())}; tokens kept: "
        f"{link('schedules_counts', counts())}. ViT-Ti/16 at "
        f"224 px, calibrated queries, no training; {seeds} seed{'s' if seeds != 1 else ''}, each "
        f"with {env['photos']} "
        "photos to calibrate on and as many others. More than constant: points of agreement more "
        "than the constant "
        f"rate of the group, by the same method or by dropping. {measured_on(env)}."
    )
    if timed is not None:
        note += f" Speed-up over no pruning on the engine: {measured_on(timed[0])}."
    return f"{note} Latency curve of POMT: {measured_on(planned_schedules[0])}."


def plot() -> None:
    """KL over that of the constant rate at the same FLOPs, mean of data and seeds, one panel a
    method."""
    planned_schedules, stored = load("schedules_plan"), load("schedules")
    if planned_schedules is None or stored is None:
        return
    plt = pyplot()
    cells = by_key(stored[1])
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axis, method in zip(axes, (DROPPING, "merging")):
        lines: dict[str, list[tuple[float, float]]] = {}
        constant = {
            row["group"]: cells[key_of(row, method)]
            for row in where(planned_schedules[1], schedule=PLAIN)
        }
        for planned in planned_schedules[1]:
            if planned["schedule"] == PLAIN or "tuned" in planned["schedule"] or keeps_all(planned):
                continue  # tuned ones have FLOPs of their own
            cell, base = cells[key_of(planned, method)], constant[planned["group"]]
            ratio = statistics.mean(row["KL"] for row in cell) / statistics.mean(
                row["KL"] for row in base
            )
            lines.setdefault(planned["schedule"], []).append((cell[0]["FLOPs"], ratio))
        for name, points in lines.items():
            line = "" if name == "DiffRate" else "-"  # its counts are of different networks
            axis.plot(*zip(*sorted(points)), marker="o", markersize=4, linestyle=line, label=name)
        axis.axhline(1, color="0.4", linewidth=0.8, label=PLAIN)
        axis.set_yscale("log")
        axis.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
        axis.set_title(method, fontsize=10)
        axis.set_xlabel("times fewer FLOPs")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("KL over that of the constant rate")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(DOCS / "schedules.png", dpi=130)
    plt.close(figure)


SECTIONS: Sections = {"schedules": section}
FILES: Files = {"schedules": table, "schedules_counts": counts}
