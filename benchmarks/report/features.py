"""The section of docs/dense-features.md: how far the features of all patches are from the unpruned ones."""

from benchmarks.report.render import Sections, grid, spread, where
from benchmarks.utils.results import load


def dense_features() -> str:
    """The error of every method, a column a rate."""
    found = load("dense_features")
    if found is None:
        return "Not measured yet."
    env, rows = found
    rates, body = list(dict.fromkeys(row["rate"] for row in rows)), []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [[row for row in rows if (row["rate"], row["method"]) == (rate, method)] for rate in rates]
        body.append([method, *(f"{spread([row['error'] for row in own], 2)}, {own[0]['FLOPs']:.2f}x" for own in cells)])
    photos = len({row["photo"] for row in rows})
    note = (
        f"{env['network']} at {env['size']} px, {env['patches']} patches; {env['photos']} photos to calibrate on. "
        "Error: the norm of the difference over that of the unpruned features, after the last norm, mean and range "
        f"over {photos} photos; and how many times fewer FLOPs. Copies: merging without fusion, each token as the one "
        "that it merged into."
    )
    head = ["error, FLOPs fewer", *(f"R = {rate}" for rate in rates)]
    return grid(head, body) + f"\n\n{note} {where(env)}."


SECTIONS: Sections = {"dense_features": dense_features}
