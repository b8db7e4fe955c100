"""The section of docs/dense-features.md: error of the features of all patches."""

from benchmarks.report.render import (
    NOT_MEASURED,
    Cell,
    Sections,
    Table,
    load,
    measured_on,
    spread,
    unique,
    where,
)


def dense_features() -> str:
    """The error of every method, a column a rate."""
    measured = load("dense_features")
    if measured is None:
        return NOT_MEASURED
    env, rows = measured
    rates = unique(rows, "rate")
    body: list[list[Cell]] = []
    for method in unique(rows, "method"):
        cells = [where(rows, rate=rate, method=method) for rate in rates]
        body.append([method, *(f"{spread(cell, 'error', 2)}, {cell[0]['FLOPs']:.2f}x" for cell in cells)])
    note = (
        f"{env['network']} at {env['size']} px, {env['patches']} patches; {env['photos']} photos to calibrate on. "
        "Error: norm of the difference from the unpruned features over the norm of these, after the last norm, mean "
        f"and range over {len(unique(rows, 'photo'))} photos; then how many times fewer FLOPs. Copies: merging without "
        "fusion, each token as the one it merged into."
    )
    head = ["error, FLOPs fewer", *(f"R = {rate}" for rate in rates)]
    return f"{Table(head, body).markdown()}\n\n{note} {measured_on(env)}."


SECTIONS: Sections = {"dense_features": dense_features}
