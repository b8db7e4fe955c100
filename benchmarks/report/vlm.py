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
    measured_on,
    unique,
    where,
)

NAMES = {
    "llava_1_5_7b": "LLaVA-1.5-7B",
    "smolvlm_256m": "SmolVLM-256M, 2 tiles",
    "qwen2_5_vl_small": "a small Qwen2.5-VL",
}


def _ratio(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:.2f}x" if row.get(key) else "-"


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
                name = NAMES[model] + (", inside too" if inside else "")
                pairs = [(row, "times fewer FLOPs", "times faster") for row in chosen]
                figures = [
                    f"{_ratio(row, flops)}, {_ratio(row, time)}" for row, flops, time in pairs
                ]
                body.append([name, *figures])
    shown = Table(["FLOPs fewer, speed-up", *(f"{100 * share:.0f} %" for share in shares)], body)
    return f"{shown.markdown()}\n\n{link('cpu_vlm', table())}. {measured_on(env)}."


SECTIONS: Sections = {"vlm": section}
FILES: Files = {"cpu_vlm": table}
