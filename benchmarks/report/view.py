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
        [_MOVES[row["move"]], f"{row['ms']:.0f}", f"{row['slowest']:.0f}", str(row["moves"])]
        for row in moves
    ]
    calibrated = [row for row in rows if "photos" in row]
    worth = ", ".join(
        f"{mean(where(calibrated, photos=photos), 'agreement'):.1f} % on {photos}"
        for photos in unique(calibrated, "photos")
    )
    note = (
        f"`{env['model']}`, two photos: from the event of the slider to both decoded pictures in "
        f"a headless Chromium on the same cores. {measured_on(env)}, {env['busy']}."
        f"\n\nAgreement at R = {env['rate']} on Tiny-ImageNet, calibrated on the examples and on "
        f"photos of that kind, mean of {len(unique(calibrated, 'seed'))} seeds: {worth} photos."
    )
    table = Table(["slider", "ms, median", "slowest", "moves"], body)
    return f"{table.markdown()}\n\n{note}"


SECTIONS: Sections = {"view": view}
