"""The section of docs/comparison.md about maps of a pretrained network with a dense head."""

from benchmarks.report.render import (
    NOT_MEASURED,
    Cell,
    Files,
    Sections,
    Spread,
    Table,
    link,
    load,
    mean,
    source,
    unique,
    where,
)

# Metric, scale and digits, in the order of the columns.
FIGURES = {
    "error, %": ("MAE", 100, 1),
    "correlation": ("correlation", 1, 3),
    "IoU, %": ("IoU", 100, 1),
}
SHOWN = (  # on the page
    "ToMe",
    "**dropping, LLF**",
    "**dropping, LLF by parents**",
    "**merging**",
    "**merging, by parents after the last block**",
)
BASELINES = ("random, LLF", "variance, LLF", "attention top-k, LLF", "ToMe")


def table(flops: float | None = None) -> Table | None:
    """Every method at every number of FLOPs, or at one: how its maps differ from those of the
    unpruned network."""
    measured = load("saliency")
    if measured is None:
        return None
    pruned = [row for row in measured[1] if row["flops"] is not None]
    data = unique(measured[1], "data")
    body: list[list[Cell]] = []
    for goal in sorted(unique(pruned, "flops")):
        for method in unique(pruned, "method"):
            cells = [where(pruned, flops=goal, method=method, data=name) for name in data]
            if not all(cells) or flops not in (None, goal):
                continue
            line: list[Cell] = [
                f"{goal:.1f}x",
                method if method in BASELINES else f"**{method}**",
                str(cells[0][0]["rate"]),
            ]
            for cell in cells:
                line += [
                    Spread([scale * row[key] for row in cell], digits)
                    for key, scale, digits in FIGURES.values()
                ]
            body.append(line)
    return Table(
        [
            "FLOPs fewer",
            "method",
            "R",
            *(f"{name}, {figure}" for name in data for figure in FIGURES),
        ],
        body,
    )


def saliency() -> str:
    measured = load("saliency")
    if measured is None:
        return NOT_MEASURED
    env, rows = measured
    unpruned = [row for row in rows if row["flops"] is None]
    middle = sorted({row["flops"] for row in rows if row["flops"] is not None})[1]
    full = table(middle)
    if full is None:
        return NOT_MEASURED
    shown = Table(full.head, [row for row in full.rows if row[1] in SHOWN])
    shown = shown.select([name for name in full.head if "correlation" not in name])
    scale = ", ".join(
        f"{100 * mean(where(unpruned, data=name), 'MAE'):.1f} % ({name})"
        for name in unique(rows, "data")
    )
    note = (
        f"The network of {env['network']} at 224 px, {env['patches']} patches. FLOPs are those of "
        "the backbone; the "
        f"head has {env['head']:.2f} times those of the unpruned one, and stays. Against the "
        "unpruned maps: mean "
        "absolute error (0 to 100 %), IoU of what is above one half. The mean map of other "
        f"photos in place of every map has an error of {scale}. {len(unique(rows, 'seed'))} "
        "seeds, each with "
        f"{env['photos']} photos to calibrate on and as many others; mean, and range over seeds. "
        f"{source('saliency', env)}. All methods and rates: {link('saliency', table())}."
    )
    return f"{shown.markdown()}\n\n{note}"


SECTIONS: Sections = {"saliency": saliency}
FILES: Files = {"saliency": table}
