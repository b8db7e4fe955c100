"""The section of docs/scale.md: engines of `cropr infer`, from few to many photos."""

from typing import Any

from benchmarks.report.render import (
    NOT_MEASURED,
    Sections,
    Spread,
    Table,
    load,
    measured_on,
    unique,
)


def engines() -> str:
    """Engines over the plain one of the same round; then seconds and memory of the others."""
    measured = load("engines")
    if measured is None:
        return NOT_MEASURED
    env, rows = measured
    timed = [row for row in rows if row["round"] >= 0]
    growing = [row for row in rows if row["round"] < 0]
    plain = {row["round"]: row for row in timed if row["engine"] == "plain"}
    table = Table(["engine", "start", "images/s", "CPU seconds", "MiB"], [])
    for engine in unique(timed, "engine"):
        alike = [row for row in timed if row["engine"] == engine]
        ratios = {
            name: Spread([row[name] / plain[row["round"]][name] for row in alike if name in row], 2)
            for name in ("start", "images/s", "CPU")
        }
        memory = f"{max(row['MiB'] for row in alike)}"
        table.rows.append([engine, *ratios.values(), memory])
    growth = ". ".join(
        growth_of(engine, [row for row in growing if row["engine"] == engine])
        for engine in unique(growing, "engine")
    )
    return (
        f"{table.markdown()}\n\nOver *plain*, {timed[0]['photos']} photos of 96 pixels, ViT-Ti at "
        f"64, in turns; start: until the first part. {growth}. {measured_on(env)}, nothing "
        "beside."
    )


def growth_of(engine: str, rows: list[dict[str, Any]]) -> str:
    """Seconds and memory of one engine from few to many photos."""
    few, *_, many = sorted(rows, key=lambda row: row["photos"])
    factor = (many["seconds"] - many["start"]) / (few["seconds"] - few["start"])
    return (
        f"{engine}, {few['photos']} to {many['photos']} photos: {factor:.1f} times the seconds, "
        f"{few['MiB']} to {many['MiB']} MiB"
    )


SECTIONS: Sections = {"engines": engines}
