"""The section of docs/benchmarks.md about the ways to restore pruned tokens."""

import statistics
from typing import Any

from benchmarks.report.render import Sections, grid, spread, where
from benchmarks.utils.results import load

PLAIN = "host's change"  # what the others are compared with
DIGITS = {"agreement": 1, "KL": 3, "features": 3}
FLOPS = {"no block": "no LLF", "one last block": PLAIN, "two last blocks": f"{PLAIN}, two last blocks"}
Row = dict[str, Any]


def values_of(rows: list[Row], column: str) -> list[Any]:
    return sorted({row[column] for row in rows})


def ways(rows: list[Row]) -> list[tuple[str, str]]:
    """Every (tokens, method), those that drop first."""
    return sorted(dict.fromkeys((row["tokens"], row["method"]) for row in rows), key=lambda way: way[0])


def means(rows: list[Row]) -> str:
    """Agreement, KL, and features where there are any: means over seeds."""
    present = {name: digits for name, digits in DIGITS.items() if all(name in row for row in rows)}
    return ", ".join(f"{statistics.mean(row[name] for row in rows):.{digits}f}" for name, digits in present.items())


def tables() -> str:
    """Every way at every rate, by data set; and what they take in FLOPs."""
    found = load("restoring")
    if found is None:
        return "Not measured yet."
    env, rows = found
    rates, parts = values_of(rows, "rate"), []
    columns = [f"R = {rate}" for rate in rates]
    for data in dict.fromkeys(row["data"] for row in rows):
        body = []
        for tokens, method in ways(rows):
            own = [row for row in rows if (row["data"], row["tokens"], row["method"]) == (data, tokens, method)]
            line = [tokens, f"**{method}**" if method == PLAIN else method]
            body.append([*line, *(means([row for row in own if row["rate"] == rate]) for rate in rates)])
        parts.append(f"{data}:\n\n{grid(['', 'restored', *columns], body)}")
    ratio = {(row["method"], row["rate"]): row["flop ratio"] for row in rows}
    body = [[name, *(f"{ratio[method, rate]:.2f}x" for rate in rates)] for name, method in FLOPS.items()]
    parts.append(f"FLOPs of the unpruned blocks over those of the pruned:\n\n{grid(['all tokens in', *columns], body)}")
    fast = load("restoring_speed")
    if fast is not None:
        timed = {(row["tokens"], row["method"], row["rate"]): row for row in fast[1]}
        body = [
            [tokens, method, *(f"{timed[tokens, method, rate]['speed-up']:.2f}x" for rate in rates)]
            for tokens, method in dict.fromkeys((row["tokens"], row["method"]) for row in fast[1])
        ]
        over = [row["times left"] for row in fast[1] if row["method"] == PLAIN]
        parts.append(
            f"Images a second over those of the unpruned network, on the engine; by hosts takes {min(over):.3f} to "
            f"{max(over):.3f} times as long as tokens as they left:\n\n{grid(['', 'restored', *columns], body)}\n\n"
            f"Batch {fast[0]['batch']}, {where(fast[0])}."
        )
    note = (
        "Agreement in %, KL, features. ViT-Ti/16 at 224 px, calibrated queries, no training; mean of "
        f"{len(values_of(rows, 'seed'))} seeds, each with {env['photos']} photos to calibrate on and as many others to "
        "compare on."
    )
    return "\n\n".join(parts) + f"\n\n{note} {where(env)}."


def differences() -> str:
    """Every way against the change of one host on the same photos."""
    found = load("restoring")
    if found is None:
        return "Not measured yet."
    env, rows = found
    cells = {tuple(row[key] for key in ("data", "tokens", "method", "seed", "rate")): row for row in rows}
    data, rates, body = list(dict.fromkeys(row["data"] for row in rows)), values_of(rows, "rate"), []
    for tokens, method in [way for way in ways(rows) if way[1] != PLAIN]:
        line = [tokens, method]
        for name in data:
            points, ratios = [], {"KL": [], "features": []}
            for seed in values_of(rows, "seed"):
                pairs = [[cells[name, tokens, one, seed, rate] for one in (method, PLAIN)] for rate in rates]
                points.append(statistics.mean(own["agreement"] - plain["agreement"] for own, plain in pairs))
                for key in [key for key in ratios if key in pairs[0][0]]:
                    ratios[key].append(statistics.geometric_mean(own[key] / plain[key] for own, plain in pairs))
            line += [
                spread(points, 1).replace("-0.0", "0.0"),
                *(spread(values, 2, "x") if values else "-" for values in ratios.values()),
            ]
        body.append(line)
    head = ["", "restored", *(f"{name}, {what}" for name in data for what in ("agreement", "KL", "features"))]
    note = (
        "Points of agreement more, KL and features as multiples: mean over the rates below; mean, and range over seeds."
    )
    return grid(head, body) + f"\n\n{note} {where(env)}."


SECTIONS: Sections = {"restoring_differences": differences, "restoring": tables}
