"""The sections, plot and CSV files of docs/training-results.md: short trainings."""

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
    mean,
    measured_on,
    source,
    spread,
    unique,
    where,
)
from benchmarks.utils.plots import pyplot
from benchmarks.utils.results import DOCS

PLOTTED = ["Cropr, merging", "Cropr", "Cropr, LLF", "ToMe", "attention top-k", "variance", "random"]
# Results, their groups of methods, and what they are called in the CSV file.
TRAININGS = {
    "50 steps": ("accuracy", ("main",)),  # the baselines are in comparison.md
    "400 steps": ("accuracy_long", ("main", "baselines")),
    "50 steps, variants": ("accuracy_variants", ("schedules", "last block")),
}
SEGMENTATION = {
    "8 epochs": "segmentation",
    "60 epochs": "segmentation_long",
    "8 epochs, lower learning rate": "segmentation_low_rate",
}
SEGMENTATION_COLUMNS = {"mIoU": 1, "pixels": 1, "GFLOPs": 2}
DETECTION = {"BCCD": "detection_bccd", "COCO128": "detection_coco128"}
DETECTION_COLUMNS = {"AP box": 1, "AP box 50": 1, "AP mask": 1, "AP mask 50": 1, "GFLOPs": 2}
Row = dict[str, Any]


def in_box(rows: list[Row]) -> Cell:
    shares = [row["in box"] for row in rows if row["in box"] is not None]
    return Spread(shares, 0) if shares else "-"


def grouped(name: str, groups: tuple[str, ...]) -> list[list[Cell]]:
    """A row a method."""
    measured = load(name)
    rows = [] if measured is None else [row for row in measured[1] if row["group"] in groups]
    body: list[list[Cell]] = []
    for method in unique(rows, "method"):
        trainings = where(rows, method=method)
        figures: list[Cell] = [
            f"{trainings[0]['GFLOPs']:.2f}",
            spread(trainings, "top-1", 1),
            in_box(trainings),
        ]
        body.append([method, *figures, str(len(trainings))])
    return body


HEAD = ["method", "GFLOPs", "top-1, %", "in the box, %", "seeds"]


def trainings_table() -> Table | None:
    """Top-1 after every training."""
    body: list[list[Cell]] = []
    for training, (name, groups) in TRAININGS.items():
        body += [[training, *line] for line in grouped(name, groups)]
    return Table(["training", *HEAD], body) if body else None


def accuracy() -> str:
    measured = load("accuracy")
    if measured is None:
        return NOT_MEASURED
    env = measured[0]
    note = (
        f"Tiny-ImageNet, ViT-Ti/16 at 224 px; one epoch over {env['photos']} photos, AdamW, "
        "learning rate "
        f"{env['lr']}, batch {env['batch']}, bfloat16; top-1 on {env['compare']} others, mean and "
        "range over seeds, "
        "which draw their own photos. In the box: of the patches kept to the end, the share in "
        "the object's box. With "
        f"400 steps, variants, GFLOPs, seeds: {link('trainings', trainings_table())}. "
        f"{source('accuracy', env)}."
    )
    table = Table(HEAD, grouped(*TRAININGS["50 steps"])).select(
        ["method", "top-1, %", "in the box, %"]
    )
    return f"{table.markdown()}\n\n{note}"


def later() -> str:
    """Describe the recipes of the other trainings of the file."""
    notes = []
    for name in ("accuracy_long", "accuracy_variants"):
        measured = load(name)
        if measured is not None:
            notes.append(f"{source(name, measured[0])}, {measured[0]['photos']} photos.")
    return " ".join(notes) or NOT_MEASURED


def factors() -> Table | None:
    """Top-1 at other FLOPs: a row a method, a column a factor."""
    measured = load("accuracy_factors")
    if measured is None:
        return None
    rows = measured[1]
    groups = sorted(
        {row["group"] for row in rows if row["group"].endswith("x")},
        key=lambda name: float(name[:-1]),
    )
    body: list[list[Cell]] = []
    for method in unique([row for row in rows if row["group"] in groups], "method"):
        cells = [where(rows, group=group, method=method) for group in groups]
        body.append([method, *(spread(cell, "top-1", 1) if cell else "-" for cell in cells)])
    return Table(["method", *groups], body)


def factors_section() -> str:
    measured, table = load("accuracy_factors"), factors()
    if measured is None or table is None:
        return NOT_MEASURED
    env, rows = measured
    note = (
        "Top-1 in %; columns: times fewer FLOPs; no pruning "
        f"{spread(where(rows, method='no pruning'), 'top-1', 1)}; "
        f"mean of {len(unique(rows, 'seed'))} seeds. With ranges: "
        f"{link('trainings_factors', table)}. "
        f"{measured_on(env)}."
    )
    return f"{table.means().markdown()}\n\n{note}"


def ablations() -> Table | None:
    """Top-1 without each part of Cropr."""
    measured = load("accuracy_factors")
    if measured is None or not where(measured[1], group="ablations"):
        return None
    rows = measured[1]
    labels = {("3x", "Cropr"): "**all parts**, from calibrated queries"}
    labels |= {
        ("ablations", method): method for method in unique(where(rows, group="ablations"), "method")
    }
    body: list[list[Cell]] = []
    for (group, method), label in labels.items():
        trainings = where(rows, group=group, method=method)
        body.append([label, spread(trainings, "top-1", 1), in_box(trainings)])
    return Table(["Cropr", "top-1, %", "in the box, %"], body)


def ablations_section() -> str:
    measured, table = load("accuracy_factors"), ablations()
    if measured is None or table is None:
        return NOT_MEASURED
    note = (
        f"3 times fewer FLOPs, mean of 3 seeds; ranges: {link('ablations', table)}. "
        f"{measured_on(measured[0])}."
    )
    return f"{table.means().markdown()}\n\n{note}"


def scorers() -> Table | None:
    """Rank correlation of scores with the attention of later blocks, before any training."""
    measured = load("scorers")
    if measured is None:
        return None
    rows = [row for row in measured[1] if "scorer" in row]
    blocks = sorted(unique(rows, "block"))
    body: list[list[Cell]] = []
    for scorer in unique(rows, "scorer"):
        of_scorer = where(rows, scorer=scorer)
        correlations = [spread(where(of_scorer, block=block), "correlation", 2) for block in blocks]
        shares = [mean(where(of_scorer, seed=seed), "in box") for seed in unique(of_scorer, "seed")]
        body.append([scorer, *correlations, Spread(shares, 0)])
    return Table(["scores", *(f"block {block + 1}" for block in blocks), "in the box, %"], body)


def untrained() -> Table | None:
    """Agreement and KL of a network that was never trained with the schedules."""
    measured = load("scorers")
    if measured is None:
        return None
    rows = [row for row in measured[1] if "schedule" in row]
    body: list[list[Cell]] = []
    for schedule in unique(rows, "schedule"):
        cell = where(rows, schedule=schedule)
        body.append([schedule, spread(cell, "agreement", 1), spread(cell, "KL", 2)])
    return Table(["schedule", "agreement, %", "KL"], body)


def by_method(rows: list[Row], columns: dict[str, int]) -> list[list[Cell]]:
    """Mean and range over seeds of some columns, a row a method."""
    body: list[list[Cell]] = []
    for method in unique(rows, "method"):
        trainings = where(rows, method=method)
        cells: list[Cell] = [
            spread(trainings, column, digits) if column in trainings[0] else "-"
            for column, digits in columns.items()
        ]
        body.append([method, *cells, str(len(trainings))])
    return body


def stacked(names: dict[str, str], title: str, columns: dict[str, int]) -> Table | None:
    """Several results in one table, told apart by the first column."""
    body: list[list[Cell]] = []
    for label, name in names.items():
        measured = load(name)
        if measured is not None:
            body += [[label, *line] for line in by_method(measured[1], columns)]
    return Table([title, "method", *columns, "seeds"], body) if body else None


def segmentation_table() -> Table | None:
    return stacked(SEGMENTATION, "training", SEGMENTATION_COLUMNS)


def detection_table() -> Table | None:
    return stacked(DETECTION, "data", DETECTION_COLUMNS)


def recipe(name: str, env: dict[str, Any]) -> str:
    return f"{env['epochs']} epochs, learning rate {env['lr']}, bfloat16. {source(name, env)}."


def segmentation() -> str:
    measured, longer = load("segmentation"), load("segmentation_long")
    if measured is None or longer is None:
        return NOT_MEASURED
    by_name = {"8 epochs, mIoU": measured[1], "60 epochs, mIoU": longer[1]}
    body: list[list[Cell]] = []
    for method in unique(longer[1], "method"):
        cells = [where(rows, method=method) for rows in by_name.values()]
        body.append([method, *(spread(cell, "mIoU", 1) for cell in cells)])
    notes = "CamVid, ViT-Ti/16, photos of 240 x 180, crops of 160 x 160. "
    notes += f"{recipe('segmentation', measured[0])} {recipe('segmentation_long', longer[0])}"
    all_figures = (
        "Ranges, other methods, pixels, GFLOPs, a lower learning rate: "
        f"{link('segmentation', segmentation_table())}."
    )
    return f"{Table(['method', *by_name], body).means().markdown()}\n\n{notes} {all_figures}"


def restored() -> Table | None:
    """Error of restored tokens against those of the same trained network without pruning."""
    measured = load("segmentation")
    rows = [] if measured is None else [row for row in measured[1] if "restored" in row]
    if not rows:
        return None
    counts = sorted({int(count) for row in rows for count in row["restored"]})
    body: list[list[Cell]] = []
    for method in unique(rows, "method"):
        errors = [row["restored"] for row in where(rows, method=method)]
        body.append(
            [method, *(Spread([error[str(count)] for error in errors], 2) for count in counts)]
        )
    return Table(["pruned after block", *map(str, counts[:-1]), "never"], body)


def detection() -> str:
    measured, other = load("detection_bccd"), load("detection_coco128")
    if measured is None:
        return NOT_MEASURED
    body = by_method(measured[1], {"AP box": 1, "AP box 50": 1})
    note = f"BCCD, ViT-Ti/16 at 256 px; {recipe('detection_bccd', measured[0])}"
    if other is not None:
        env = other[0]
        note += (
            f" With COCO128 ({env['photos']} of its photos, drawn by the seed, all objects of one "
            "category; "
            f"{recipe('detection_coco128', env)[:-1]}): {link('detection', detection_table())}."
        )
    table = Table(["method", "AP box", "AP box 50", "seeds"], body).select(["method", "AP box"])
    return f"{table.markdown()}\n\n{note}"


def training_step() -> str:
    """Speed of a training step with Cropr, in a sentence a row."""
    measured = load("cpu_training")
    if measured is None:
        return NOT_MEASURED
    env, rows = measured
    sentences = [
        f"{row['model']}, batch {row['batch']}, R = {row['rate']}: {row['unpruned / Cropr']:.2f}x "
        "the speed of a step "
        f"without pruning; the auxiliary path adds {100 * row['auxiliary path adds']:.0f} %."
        for row in rows
    ]
    return (
        f"{' '.join(sentences)} Forward, loss and backward, bfloat16 autocast; medians. "
        f"{measured_on(env)}."
    )


SECTIONS: Sections = {
    "training_step": training_step,
    "accuracy": accuracy,
    "accuracy_later": later,
    "accuracy_factors": factors_section,
    "ablations": ablations_section,
    "segmentation": segmentation,
    "detection": detection,
}
FILES: Files = {
    "trainings": trainings_table,
    "trainings_factors": factors,
    "ablations": ablations,
    "scorers": scorers,
    "untrained": untrained,
    "restored": restored,
    "segmentation": segmentation_table,
    "detection": detection_table,
}


def plot() -> None:
    """Top-1 after a short training against FLOPs, one line a method."""
    main, others = load("accuracy"), load("accuracy_factors")
    if main is None or others is None:
        return
    plt = pyplot()
    rows = [row for row in main[1] if row["group"] in ("main", "baselines")]
    rows += [
        row for row in others[1] if row["group"] != "ablations" and row["method"] != "no pruning"
    ]
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for method in PLOTTED:
        points: dict[float, list[float]] = {}
        for row in where(rows, method=method):
            points.setdefault(round(row["GFLOPs"], 2), []).append(row["top-1"])
        flops = sorted(points)
        means = [statistics.mean(points[x]) for x in flops]
        below = [center - min(points[x]) for x, center in zip(flops, means)]
        above = [max(points[x]) - center for x, center in zip(flops, means)]
        bold = (
            {"linewidth": 2.4} if method.startswith("Cropr") else {"linewidth": 1.2, "alpha": 0.8}
        )
        axis.errorbar(
            flops, means, [below, above], marker="o", markersize=4, capsize=2, label=method, **bold
        )
    unpruned = mean(where(rows, method="no pruning"), "top-1")
    axis.axhline(unpruned, color="0.4", linewidth=0.8, label="no pruning")
    axis.set_xlabel("GFLOPs")
    axis.set_ylabel("top-1 after 50 steps, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title("ViT-Ti/16, Tiny-ImageNet: mean, and range over seeds", fontsize=9)
    figure.savefig(DOCS / "accuracy.png", dpi=130)
    plt.close(figure)
