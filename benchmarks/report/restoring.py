"""The section of docs/benchmarks.md about restoring pruned tokens, and its CSV files."""

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
    source,
    spread,
    unique,
    where,
)

PLAIN = "parent's change"  # what the others are compared with
DIGITS = {"agreement": 1, "KL": 3, "features": 3}
SHOWN = ("no LLF", "as_pruned", "copy of the parent")
Row = dict[str, Any]


def ways(rows: list[Row]) -> list[tuple[str, str]]:
    """Every (tokens, method), those that drop first."""
    return sorted(
        dict.fromkeys((row["tokens"], row["method"]) for row in rows), key=lambda way: way[0]
    )


def cells() -> Table | None:
    """Every way at every rate, by data set."""
    measured = load("restoring")
    if measured is None:
        return None
    rows = measured[1]
    body: list[list[Cell]] = []
    for data in unique(rows, "data"):
        for tokens, method in ways(rows):
            for rate in sorted(unique(rows, "rate")):
                cell = where(rows, data=data, tokens=tokens, method=method, rate=rate)
                figures = [
                    spread(cell, name, DIGITS[name]) if name in cell[0] else "-" for name in DIGITS
                ]
                body.append(
                    [data, tokens, method, str(rate), *figures, f"{cell[0]['flop ratio']:.2f}x"]
                )
    return Table(
        ["data", "tokens", "restored", "R", "agreement, %", "KL", "features", "FLOPs fewer"], body
    )


def speed() -> Table | None:
    """Speed of every way at every rate, over that of the unpruned network."""
    timed = load("restoring_speed")
    if timed is None:
        return None
    body: list[list[Cell]] = [
        [
            row["tokens"],
            row["method"],
            str(row["rate"]),
            f"{row['speed-up']:.2f}x",
            f"{row['times left']:.3f}",
        ]
        for row in timed[1]
    ]
    return Table(["tokens", "restored", "R", "speed-up", "time over that of as_pruned"], body)


def differences(shown: tuple[str, ...] | None = None) -> Table | None:
    """Every way, or those of `shown`, against the change of one parent on the same photos."""
    measured = load("restoring")
    if measured is None:
        return None
    rows = measured[1]
    lookup = {
        tuple(row[key] for key in ("data", "tokens", "method", "seed", "rate")): row for row in rows
    }
    data, rates, seeds = (
        unique(rows, "data"),
        sorted(unique(rows, "rate")),
        sorted(unique(rows, "seed")),
    )
    body: list[list[Cell]] = []
    for tokens, method in ways(rows):
        if method == PLAIN or (shown is not None and method not in shown):
            continue
        line: list[Cell] = [tokens, method]
        for name in data:
            points: list[float] = []
            ratios: dict[str, list[float]] = {"KL": [], "features": []}
            for seed in seeds:
                pairs = [
                    (
                        lookup[name, tokens, method, seed, rate],
                        lookup[name, tokens, PLAIN, seed, rate],
                    )
                    for rate in rates
                ]
                points.append(
                    statistics.mean(row["agreement"] - base["agreement"] for row, base in pairs)
                )
                for key, values in ratios.items():
                    if key in pairs[0][0]:
                        values.append(
                            statistics.geometric_mean(row[key] / base[key] for row, base in pairs)
                        )
            line += [
                Spread(points, 1),
                *(Spread(values, 2) if values else "-" for values in ratios.values()),
            ]
        body.append(line)
    head = ["tokens", "restored"]
    for name in data:
        head += [f"{name}, agreement", f"{name}, KL ratio", f"{name}, features ratio"]
    return Table(head, body)


def section() -> str:
    """The ways that a reader chooses from, and links to all."""
    measured, timed = load("restoring"), load("restoring_speed")
    table = differences(SHOWN)
    if measured is None or table is None:
        return NOT_MEASURED
    env, rows = measured
    shown = table.means().select([name for name in table.head if "Imagenette" not in name])
    note = (
        f"Against *{PLAIN}* at the same rate: points of agreement, KL and features as multiples; "
        "mean over R = "
        f"{', '.join(map(str, sorted(unique(rows, 'rate'))))} and {len(unique(rows, 'seed'))} "
        "seeds, "
        f"{env['photos']} photos each. ViT-Ti/16 at 224 px. {source('restoring', env)}. "
        f"Imagenette, ranges, other ways: {link('restoring_differences', differences())}; "
        f"every cell: {link('restoring', cells())}"
    )
    if timed is None:
        return f"{shown.markdown()}\n\n{note}."
    over = [row["times left"] for row in timed[1] if row["method"] == PLAIN]
    note += (
        f"; speed: {link('restoring_speed', speed())}, batch {timed[0]['batch']}, "
        f"{measured_on(timed[0])}: tracking "
        f"parents takes {min(over):.3f} to {max(over):.3f} times as long as as_pruned."
    )
    return f"{shown.markdown()}\n\n{note}"


SECTIONS: Sections = {"restoring": section}
FILES: Files = {"restoring": cells, "restoring_differences": differences, "restoring_speed": speed}
