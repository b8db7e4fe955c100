"""The sections and CSV files of docs/dense-features.md: error of the features of all patches."""

import itertools

from benchmarks.report.render import (
    NOT_MEASURED,
    Cell,
    Files,
    Sections,
    Table,
    link,
    load,
    measured_on,
    spread,
    unique,
    where,
)


def table() -> Table | None:
    """Error after the last block and FLOPs of every method at every rate."""
    measured = load("dense_features")
    if measured is None:
        return None
    rows = where(measured[1], block=max(unique(measured[1], "block")))
    body: list[list[Cell]] = []
    for rate in unique(rows, "rate"):
        for method in unique(rows, "method"):
            cell = where(rows, rate=rate, method=method)
            body.append(
                [f"R = {rate}", method, spread(cell, "error", 2), f"{cell[0]['FLOPs']:.2f}x"]
            )
    return Table(["R", "method", "error", "FLOPs fewer"], body)


def maps_table() -> Table | None:
    """Error of the maps of several blocks, at every rate."""
    measured = load("dense_features")
    if measured is None:
        return None
    rows = measured[1]
    blocks = sorted(unique(rows, "block"))
    methods = unique(where(rows, block=blocks[0]), "method")
    body: list[list[Cell]] = []
    for method, rate in itertools.product(methods, unique(rows, "rate")):
        cells = where(rows, method=method, rate=rate)
        body.append(
            [
                f"{method.partition(',')[0]}, {rate}",
                *(spread(where(cells, block=block), "error", 2) for block in blocks),
                f"{cells[0]['FLOPs']:.2f}x",
            ]
        )
    head = [f"block {blocks[0]}", *map(str, blocks[1:])]
    return Table(["method, R", *head, "FLOPs fewer"], body)


def dense_features() -> str:
    """The middle rate, without the methods of `dense_maps`, and a link to all."""
    measured, full = load("dense_features"), table()
    if measured is None or full is None:
        return NOT_MEASURED
    env, rows = measured
    rates = unique(rows, "rate")
    rate = f"R = {rates[len(rates) // 2]}"
    mapped = unique(where(rows, block=min(unique(rows, "block"))), "method")
    body = [row for row in full.rows if row[0] == rate and row[1] not in mapped]
    shown = Table(full.head, body).select(["method", "error", "FLOPs fewer"])
    note = (
        f"{rate}; others: {link('dense_features', full)}. {env['network']} at {env['size']} px, "
        f"{env['patches']} "
        f"patches; {env['photos']} photos to calibrate on. Error: norm of the difference from the "
        "unpruned features "
        "over the norm of these, after the last norm, mean and range over "
        f"{len(unique(rows, 'photo'))} photos. Copies: merging without fusion. {measured_on(env)}."
    )
    return f"{shown.markdown()}\n\n{note}"


def dense_maps() -> str:
    """Mean errors of the maps of several blocks."""
    full = maps_table()
    if full is None:
        return NOT_MEASURED
    return f"{full.means().markdown()}\n\nRanges: {link('dense_maps', full)}."


SECTIONS: Sections = {"dense_features": dense_features, "dense_maps": dense_maps}
FILES: Files = {"dense_features": table, "dense_maps": maps_table}
