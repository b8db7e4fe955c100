"""The section and picture of docs/comparison.md about schedules: agreement and speed of every one that was planned."""

import statistics
from typing import Any

from benchmarks.report.render import Sections, grid, spread, where
from benchmarks.utils.plots import pyplot
from benchmarks.utils.results import DOCS, hashable, load

PLAIN = "constant"  # what the others of a group are compared with,
DROPPING = "dropping"  # by this method, where theirs does not have it
Row = dict[str, Any]
Cell = tuple[str, str, tuple[int, ...], str]


def cell_of(row: Row, method: str | None = None) -> Cell:
    """Group, schedule, counts and method: what was measured with other counts is another cell."""
    return row["group"], row["schedule"], hashable(row["keep"]), method or row["method"]


def keeps_all(planned: Row) -> bool:
    return len(set(planned["keep"])) == 1


def by_cell(rows: list[Row]) -> dict[Cell, list[Row]]:
    found: dict[Cell, list[Row]] = {}
    for row in rows:
        found.setdefault(cell_of(row), []).append(row)
    return found


def gain(own: list[Row], plain: list[Row], data: str) -> str:
    """Points of agreement more than the constant rate of the group, on the same photos."""
    agreed = [{row["seed"]: row["agreement"] for row in rows if row["data"] == data} for rows in (own, plain)]
    shared = agreed[0].keys() & agreed[1].keys()
    return spread([agreed[0][seed] - agreed[1][seed] for seed in sorted(shared)], 1) if shared else "-"


def tables() -> str:
    """One table a method, a line a schedule."""
    plan, found, timed = load("schedules_plan"), load("schedules"), load("schedules_speed")
    if plan is None or found is None:
        return "Not measured yet."
    env, rows = found
    measured, speeds = by_cell(rows), by_cell([] if timed is None else timed[1])
    constant = {row["group"]: hashable(row["keep"]) for row in plan[1] if row["schedule"] == PLAIN}
    data = list(dict.fromkeys(row["data"] for row in rows))
    batches = sorted({row["batch"] for row in ([] if timed is None else timed[1])})
    columns = [f"{name}, {what}" for name in data for what in ("agreement, %", "more than constant", "KL")]
    head = ["group", "schedule", "FLOPs fewer", *columns, *(f"speed-up, batch {batch}" for batch in batches)]
    parts = []
    for method in dict.fromkeys(row["method"] for row in rows):
        body = []
        for planned in plan[1]:
            own = measured.get(cell_of(planned, method))
            if own is None or keeps_all(planned):
                continue
            group, schedule, *_ = cell_of(planned, method)
            plains = [measured.get((group, PLAIN, constant[group], name)) for name in (method, DROPPING)]
            plain = plains[0] or plains[1] or []
            line = [group, schedule, f"{own[0]['FLOPs']:.2f}x"]
            for name in data:
                of_data = [row for row in own if row["data"] == name]
                values = [[row[key] for row in of_data] for key in ("agreement", "KL")]
                more = "" if schedule == PLAIN else gain(own, plain, name)
                line += [spread(values[0], 1), more, spread(values[1], 3)] if of_data else ["-"] * 3
            fast = {row["batch"]: row["speed-up"] for row in speeds.get(cell_of(planned, method), [])}
            body.append([*line, *(f"{fast[batch]:.2f}x" if batch in fast else "-" for batch in batches)])
        if body:
            parts.append(f"By {method}:\n\n{grid(head, body)}")
    kept = [[row["group"], row["schedule"], ", ".join(map(str, row["keep"]))] for row in plan[1]]
    parts.append(f"Tokens kept:\n\n{grid(['group', 'schedule', 'after block 1, 2, ...'], kept)}")
    seeds = sorted({row["seed"] for row in rows})
    note = (
        "ViT-Ti/16 at 224 px, calibrated queries, no training. Agreement and KL are with the unpruned model; "
        f"{len(seeds)} seed{'s' if len(seeds) != 1 else ''}, each with {env['photos']} photos to calibrate on and as "
        "many others to compare on; mean, and range over seeds. More than constant: points of agreement more than the "
        f"constant rate of the group, by the same method or by dropping. {where(env)}."
    )
    if timed is not None:
        note += f" Speed-up over the unpruned model on the engine: {where(timed[0])}."
    return "\n\n".join(parts) + f"\n\n{note} Latency of the plan: {where(plan[0])}."


def plot() -> None:
    """KL over that of the constant rate at the same FLOPs, mean of data and seeds, one panel a method."""
    plan, found = load("schedules_plan"), load("schedules")
    if plan is None or found is None:
        return
    plt = pyplot()
    measured = by_cell(found[1])
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axis, method in zip(axes, (DROPPING, "merging")):
        lines: dict[str, list[tuple[float, float]]] = {}
        constant = {row["group"]: measured[cell_of(row, method)] for row in plan[1] if row["schedule"] == PLAIN}
        for planned in plan[1]:
            if planned["schedule"] == PLAIN or "tuned" in planned["schedule"] or keeps_all(planned):
                continue  # tuned ones have FLOPs of their own
            own, plain = measured[cell_of(planned, method)], constant[planned["group"]]
            ratio = statistics.mean(row["KL"] for row in own) / statistics.mean(row["KL"] for row in plain)
            lines.setdefault(planned["schedule"], []).append((own[0]["FLOPs"], ratio))
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


SECTIONS: Sections = {"schedules": tables}
