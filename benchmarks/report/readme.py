"""The section of README.md: agreement, accuracy and speed of one pretrained model."""

from benchmarks.report.off_the_shelf import speeds
from benchmarks.report.render import (
    NOT_MEASURED,
    Cell,
    Sections,
    Table,
    load,
    mean,
    measured_on,
    unique,
    where,
)

METHODS = {"merge": "**Cropr, merging**", "calibrated": "Cropr, dropping", "ToMe": "ToMe"}


def pretrained() -> str:
    """Agreement, top-1 and speed of three methods at every rate."""
    measured, timed, speed = load("off_the_shelf"), load("off_the_shelf_speed"), speeds()
    if measured is None or timed is None:
        return NOT_MEASURED
    env, rows = measured
    # The data set whose classes it knows
    rows = [row for row in rows if "top-1" in row and row["method"] in METHODS]
    body: list[list[Cell]] = []
    for rate in sorted(unique(rows, "rate")):
        line: list[Cell] = [str(rate)]
        for method in METHODS:
            cell = where(rows, rate=rate, method=method)
            faster = f"{speed[rate, method]:.2f}x" if (rate, method) in speed else "-"
            line.append(f"{mean(cell, 'agreement'):.1f}, {mean(cell, 'top-1'):.1f}, {faster}")
        body.append(line)
    note = (
        f"*Agreement in %, top-1 in % (no pruning: {mean(rows, 'top-1 unpruned'):.1f}) and speed "
        "over no pruning of "
        f"`{env['model']}` on {rows[0]['data']}, mean of {len(unique(rows, 'seed'))} seeds: "
        f"{env['photos']} photos to "
        f"calibrate on, as many others to measure on; speed at batch {timed[0]['batch']}, "
        "float32, on one engine, "
        f"{measured_on(timed[0])}. Ranges and thirteen more methods: "
        "[comparison](docs/comparison.md).*"
    )
    return f"{Table(['R', *METHODS.values()], body).markdown()}\n\n{note}"


SECTIONS: Sections = {"pretrained": pretrained}
