"""The section of docs/view.md: milliseconds a move, and what queries of few photos are worth."""

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

_MOVES = {
    "new rate": "the rate, to one not seen yet",
    "seen rate": "the rate, back",
    "block": "the block",
}


def view() -> str:
    """Time of each move, and agreement by the number of photos calibrated on."""
    measured = load("view")
    if measured is None:
        return NOT_MEASURED
    env, rows = measured
    moves = [row for row in rows if "move" in row]
    body: list[list[Cell]] = [
        [_MOVES[row["move"]], str(row["ms"]), str(row["slowest"])] for row in moves
    ]
    note = (
        f"`{env['model']}`, two photos, {moves[0]['moves']} moves: from the slider's event to both "
        "pictures in a headless Chromium on the same cores, load average "
        f"{moves[0]['load']} before. {measured_on(env)}."
    )
    calibrated = [row for row in rows if "photos" in row]
    if calibrated:
        few, many = (
            f"{mean(where(calibrated, photos=photos), 'agreement'):.1f} %"
            for photos in sorted(unique(calibrated, "photos"))
        )
        note += (
            f"\n\nAgreement at R = {env['rate']} on Tiny-ImageNet, mean of "
            f"{len(unique(calibrated, 'seed'))} seeds: {few} calibrated on the examples, {many} on "
            f"{max(unique(calibrated, 'photos'))} photos."
        )
    table = Table(["slider", "ms, median", "slowest"], body)
    return f"{table.markdown()}\n\n{note}"


SECTIONS: Sections = {"view": view}
