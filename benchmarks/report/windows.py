"""The section and CSV file of docs/supported-models.md: FLOPs with windows that are pruned."""

from benchmarks.report.render import (
    NOT_MEASURED,
    Cell,
    Files,
    Sections,
    Table,
    link,
    load,
    unique,
    where,
)


def table() -> Table | None:
    """FLOPs of every encoder, unpruned and with windows pruned."""
    measured = load("windows")
    if measured is None:
        return None
    rows = measured[1]
    shares = unique(rows, "kept")
    body: list[list[Cell]] = []
    for name in unique(rows, "encoder"):
        cells = where(rows, encoder=name)
        ratios = [f"{cell['FLOPs']:.2f}x" for cell in cells]
        body.append([name, f"{cells[0]['size']}", f"{cells[0]['GFLOPs']:.0f}", *ratios])
    return Table(["encoder", "px", "GFLOPs", *(f"{share} % left" for share in shares)], body)


def windows() -> str:
    """The ratios at half of the tokens, in one sentence."""
    measured, full = load("windows"), table()
    if measured is None or full is None:
        return NOT_MEASURED
    rows = where(measured[1], kept=50)
    ratios = "; ".join(f"{row['encoder']} {row['FLOPs']:.2f}" for row in rows)
    return (
        f"Times fewer FLOPs if half of the tokens reach the last block: {ratios} "
        f"({link('windows', full)}; SAM 2 is not supported)."
    )


SECTIONS: Sections = {"windows": windows}
FILES: Files = {"windows": table}
