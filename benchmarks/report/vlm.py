"""The section and CSV file of docs/vlm.md: FLOPs and time with fewer image tokens."""

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
    measured_on,
    unique,
    where,
)

NAMES = {
    "llava_1_5_7b": "LLaVA-1.5-7B",
    "qwen2_5_vl_7b": "Qwen2.5-VL-7B",
    "smolvlm_256m_17": "SmolVLM-256M, 17 tiles",
    "smolvlm_256m": "SmolVLM-256M, 2 tiles",
    "qwen2_5_vl_small": "small Qwen2.5-VL",
}
# Target and choice of the rows of the page
QUERIES = (
    ("evenly spaced", "of runs"),
    ("tower", "of runs"),
    ("reader", "highest"),
    ("reader", "of runs"),
)
NAMED = {"tower": "tower's last blocks", "reader": "reader"}


def _ratio(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:.2f}x" if row.get(key) else "-"


def _figures(row: dict[str, Any]) -> str:
    flops = _ratio(row, "times fewer FLOPs")
    return flops if "times faster" not in row else f"{flops}, {_ratio(row, 'times faster')}"


def table() -> Table | None:
    """FLOPs and time of every model at every share."""
    measured = load("cpu_vlm")
    if measured is None:
        return None
    body: list[list[Cell]] = [
        [
            NAMES[row["model"]],
            f"{100 * row['dropped']:.0f} %",
            "inside" if row["inside"] else "behind",
            str(row["prompt tokens"]),
            _ratio(row, "times fewer FLOPs"),
            _ratio(row, "times faster"),
        ]
        for row in measured[1]
        if row["dropped"]
    ]
    return Table(["model", "dropped", "tower", "prompt", "FLOPs fewer", "speed-up"], body)


def section() -> str:
    """A row a model and place, in the columns shares that are dropped."""
    measured = load("cpu_vlm")
    if measured is None:
        return NOT_MEASURED
    env, rows = measured
    shares = [share for share in unique(rows, "dropped") if share]
    body: list[list[Cell]] = []
    for model in unique(rows, "model"):
        for inside in (False, True):
            cells = where(rows, model=model, inside=inside)
            chosen = [row for share in shares for row in where(cells, dropped=share)]
            if chosen:
                name = NAMES[model] + (", inside" if inside else "")
                body.append([name, *(_figures(row) for row in chosen)])
    shown = Table(["FLOPs fewer, speed-up", *(f"{100 * share:.0f} %" for share in shares)], body)
    return f"{shown.markdown()}\n\n{link('cpu_vlm', table())}. {measured_on(env)}."


def queries_table() -> Table | None:
    """Every target and choice, on each data set: means of the seeds."""
    measured = load("image_queries")
    if measured is None:
        return None
    keys = ("data", "keep", "target", "choice")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in measured[1]:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    body: list[list[Cell]] = [
        [
            data,
            f"{100 * keep:g} %",
            target,
            choice,
            f"{mean(rows, 'agreement'):.1f}",
            f"{mean(rows, 'KL'):.3f}",
            f"{mean(rows, 'attention'):.1f}",
        ]
        for (data, keep, target, choice), rows in groups.items()
    ]
    header = ["data", "kept", "query fitted to", "chosen", "agreement, %", "KL", "attention, %"]
    return Table(header, body)


def queries_section() -> str:
    """KL divergence of the main variants, mean of data sets and seeds."""
    measured = load("image_queries")
    if measured is None:
        return NOT_MEASURED
    env, rows = measured
    shares = [share for share in unique(rows, "keep") if share >= 0.25]
    body: list[list[Cell]] = []
    for target, choice in QUERIES:
        name = target if target not in NAMED else f"{NAMED[target]}, {choice}"
        cells = [where(rows, target=target, choice=choice, keep=share) for share in shares]
        body.append([name, *(f"{mean(cell, 'KL'):.3f}" for cell in cells)])
    shown = Table(["KL, kept", *(f"{100 * share:g} %" for share in shares)], body)
    return f"{shown.markdown()}\n\n{link('image_queries', queries_table())}. {measured_on(env)}."


SECTIONS: Sections = {"vlm": section, "image_queries": queries_section}
FILES: Files = {"cpu_vlm": table, "image_queries": queries_table}
