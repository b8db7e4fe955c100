"""The section of README.md: what pruning leaves of one pretrained model's answers, and how fast it is."""

import statistics

from benchmarks.report.comparison import speeds
from benchmarks.report.render import Sections, grid, where
from benchmarks.utils.results import load

METHODS = {"calibrated": "dropping", "merge": "**merging**", "ToMe": "ToMe"}


def pretrained() -> str:
    """Agreement, top-1 and speed of three methods at every rate; a row whose speed was not measured is left out."""
    found, timed, speed = load("off_the_shelf"), load("off_the_shelf_speed"), speeds()
    if found is None or timed is None:
        return "Not measured yet."
    env, rows = found
    rows = [row for row in rows if "top-1" in row and row["method"] in METHODS]  # the data set whose classes it knows
    plain = statistics.mean(row["top-1 unpruned"] for row in rows)
    body = [["0", "unpruned", "100.0", f"{plain:.1f}", "1.00x"]]
    for rate in sorted({row["rate"] for row in rows}):
        for method, label in METHODS.items():
            own = [row for row in rows if (row["rate"], row["method"]) == (rate, method)]
            if own and (rate, method) in speed:
                agreement, top = (statistics.mean(row[key] for row in own) for key in ("agreement", "top-1"))
                body.append([str(rate), label, f"{agreement:.1f}", f"{top:.1f}", f"{speed[rate, method]:.2f}x"])
    seeds = len({row["seed"] for row in rows})
    note = (
        f"`{env['model']}` at 224 px, {rows[0]['data']}, {seeds} seeds: {env['photos']} photos to calibrate on and "
        f"as many others to compare on. Speed: batch {timed[0]['batch']}, float32, over unpruned on the same engine, "
        f"{where(timed[0])}."
    )
    return grid(["R", "", "agreement, %", "top-1, %", "speed"], body) + f"\n\n{note}"


SECTIONS: Sections = {"pretrained": pretrained}
