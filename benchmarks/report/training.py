"""Tables and the plot of docs/training-results.md: what was trained, and what it says."""

import statistics
from typing import Any

from benchmarks.report.render import Sections, grid, spread, where
from benchmarks.utils.plots import pyplot
from benchmarks.utils.results import DOCS, load

LINES = ["Cropr, merging", "Cropr", "Cropr, LLF", "ToMe", "attention top-k", "variance", "random"]


def accuracy(name: str, groups: tuple[str, ...]) -> str:
    """Top-1 after a short training, by method."""
    found = load(name)
    if found is None:
        return "Classification: not measured yet."
    env, rows = found
    body = []
    rows = [row for row in rows if row["group"] in groups]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        line = [method, f"{own[0]['GFLOPs']:.2f}", spread([row["top-1"] for row in own], 1)]
        body.append([*line, in_box(own), str(len(own))])
    note = (
        f"Tiny-ImageNet, ViT-Ti/16 at 224 px; epochs: {env['epochs']}, over {env['photos']} photos, AdamW, "
        f"learning rate {env['lr']}, batch {env['batch']}, bfloat16; top-1 on {env['compare']} others, mean and range "
        "over seeds, which draw their own photos. In the box: of the patches kept to the end, the share in the "
        "object's box."
    )
    head = ["method", "GFLOPs", "top-1, %", "in the box, %", "seeds"]
    return grid(head, body) + f"\n\n{note} {where(env)}."


def factors() -> str:
    """The same at other FLOPs: a line a method, a column a factor."""
    found = load("accuracy_factors")
    if found is None:
        return "At other FLOPs: not measured yet."
    env, rows = found
    groups = sorted({row["group"] for row in rows if row["group"].endswith("x")}, key=lambda name: float(name[:-1]))
    body, counts = [], set()
    for method in dict.fromkeys(row["method"] for row in rows if row["group"] in groups):
        line = [method]
        for group in groups:
            own = [row["top-1"] for row in rows if (row["group"], row["method"]) == (group, method)]
            line.append(spread(own, 1) if own else "-")
            counts.add(len(own))
        body.append(line)
    plain = [row["top-1"] for row in rows if row["method"] == "no pruning"]
    seeds = len({row["seed"] for row in rows})
    note = f"Top-1 in %; columns: times fewer FLOPs; no pruning {spread(plain, 1)}; {seeds} seeds, as above"
    note += "; one seed where there is no range." if 1 in counts else "."
    return grid(["method", *groups], body) + f"\n\n{note} {where(env)}."


def ablations() -> str:
    """What each part of Cropr is good for."""
    found = load("accuracy_factors")
    if found is None or not any(row["group"] == "ablations" for row in found[1]):
        return "Its parts: not measured yet."
    env, rows = found
    shown = {("3x", "Cropr"): "**as it is**, from calibrated queries"}
    shown |= {("ablations", row["method"]): row["method"] for row in rows if row["group"] == "ablations"}
    body = []
    for (group, method), label in shown.items():
        own = [row for row in rows if (row["group"], row["method"]) == (group, method)]
        body.append([label, spread([row["top-1"] for row in own], 1), in_box(own), str(len(own))])
    return (
        grid(["Cropr", "top-1, %", "in the box, %", "seeds"], body)
        + f"\n\n3 times fewer FLOPs, as above. {where(env)}."
    )


def in_box(rows: list[dict[str, Any]]) -> str:
    shares = [row["in box"] for row in rows if row["in box"] is not None]
    return spread(shares, 0) if shares else "-"


def scorers() -> str:
    """What scores know before any training."""
    found = load("scorers")
    if found is None:
        return "Not measured yet."
    env, rows = found
    blocks = [0, 2, 4, 6, 8, 10]
    body = []
    for scorer in dict.fromkeys(row["scorer"] for row in rows if "scorer" in row):
        own = [row for row in rows if row.get("scorer") == scorer]
        line = [statistics.mean(row["correlation"] for row in own if row["block"] == block) for block in blocks]
        shares = [
            statistics.mean(row["in box"] for row in own if row["seed"] == seed)
            for seed in {row["seed"] for row in own}
        ]
        body.append([scorer, *(f"{value:.2f}" for value in line), spread(shares, 0)])
    seeds = len({row["seed"] for row in rows})
    head = ["scores", *(f"block {block + 1}" for block in blocks), "in the box, %"]
    note = (
        "Rank correlation, behind a block, with how much the later blocks attend to a patch; in the box: of the better "
        f"half, all blocks. {env['photos']} photos that no query was calibrated on, {seeds} seeds. {where(env)}."
    )
    return grid(head, body) + f"\n\n{note}"


def untrained() -> str:
    """What the schedules take from a network that was never trained with them."""
    found = load("scorers")
    if found is None:
        return "Not measured yet."
    env, rows = found
    body = []
    for schedule in dict.fromkeys(row["schedule"] for row in rows if "schedule" in row):
        own = [row for row in rows if row.get("schedule") == schedule]
        body.append([schedule, spread([row["agreement"] for row in own], 1), spread([row["KL"] for row in own], 2)])
    note = f"Calibrated queries, no training; agreement and KL with the unpruned network. {where(env)}."
    return grid(["schedule", "agreement, %", "KL"], body) + f"\n\n{note}"


def by_method(name: str, title: str, columns: dict[str, int]) -> str:
    """Mean and range over seeds of some columns, a line a method."""
    found = load(name)
    if found is None:
        return f"{title}: not measured yet."
    env, rows = found
    body = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        cells = [spread([row[column] for row in own], digits) for column, digits in columns.items()]
        body.append([method, *cells, str(len(own))])
    title += f", {env['photos']} of its photos, drawn by the seed" if env.get("photos") else ""
    title += ", all objects of one category" if env.get("one_category") else ""
    note = f"{title}; {env['epochs']} epochs, learning rate {env['lr']}, bfloat16; mean and range over seeds."
    return grid(["method", *columns, "seeds"], body) + f"\n\n{note} {where(env)}."


def restored() -> str:
    """How far restored tokens are from those of the same network unpruned, after training."""
    found = load("segmentation")
    rows = [row for row in found[1] if "restored" in row] if found is not None else []
    if not rows:
        return "Not measured yet."
    blocks = sorted({int(count) for row in rows for count in row["restored"]})
    body = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row["restored"] for row in rows if row["method"] == method]
        body.append([method, *(spread([one[str(count)] for one in own], 2) for count in blocks)])
    head = ["pruned after block", *(str(count) for count in blocks[:-1]), "never"]
    note = (
        "Squared error of what the last block reads, the normed tokens, over the variance of those of the same trained "
        f"network without pruning. 8 epochs, seed {', '.join(str(seed) for seed in sorted({r['seed'] for r in rows}))}."
    )
    return grid(head, body) + f"\n\n{note}"


def training_step() -> str:
    """What a training step costs with Cropr."""
    found = load("cpu_training")
    if found is None:
        return "A training step: not measured yet."
    env, rows = found
    body = [
        [
            row["model"],
            str(row["batch"]),
            str(row["rate"]),
            f"{row['unpruned / Cropr']:.2f}x",
            f"{100 * row['auxiliary path adds']:.0f} %",
        ]
        for row in rows
    ]
    head = ["model", "batch", "R", "training with Cropr, speed-up", "auxiliary path adds"]
    return grid(head, body) + f"\n\nForward, loss and backward, bfloat16 autocast; medians. {where(env)}."


CAMVID = "CamVid, ViT-Ti/16, photos of 240 x 180, crops of 160 x 160"
DETECTION_COLUMNS = {"AP box": 1, "AP box 50": 1, "GFLOPs": 2}
CAMVID_COLUMNS = {"mIoU": 1, "pixels": 1, "GFLOPs": 2}
SECTIONS: Sections = {
    "training_step": training_step,
    "accuracy": lambda: accuracy("accuracy", ("main",)),  # the baselines are in comparison.md
    "accuracy_long": lambda: accuracy("accuracy_long", ("main", "baselines")),
    "accuracy_variants": lambda: accuracy("accuracy_variants", ("schedules", "last block")),
    "accuracy_factors": factors,
    "ablations": ablations,
    "scorers": scorers,
    "untrained": untrained,
    "segmentation": lambda: by_method("segmentation", CAMVID, CAMVID_COLUMNS),
    "restored": restored,
    "segmentation_long": lambda: by_method("segmentation_long", CAMVID, CAMVID_COLUMNS),
    "segmentation_low_rate": lambda: by_method("segmentation_low_rate", CAMVID, CAMVID_COLUMNS),
    "detection_bccd": lambda: by_method("detection_bccd", "BCCD, ViT-Ti/16 at 256 px", DETECTION_COLUMNS),
    "detection_coco128": lambda: by_method(
        "detection_coco128", "COCO128, ViT-Ti/16 at 256 px", DETECTION_COLUMNS | {"AP mask": 1, "AP mask 50": 1}
    ),
}


def plot() -> None:
    """Top-1 after a short training against FLOPs, one line a method."""
    main, others = load("accuracy"), load("accuracy_factors")
    if main is None or others is None:
        return
    plt = pyplot()
    rows = [row for row in main[1] if row["group"] in ("main", "baselines")]
    rows += [row for row in others[1] if row["group"] != "ablations" and row["method"] != "no pruning"]
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for method in LINES:
        points: dict[float, list[float]] = {}
        for row in rows:
            if row["method"] == method:
                points.setdefault(round(row["GFLOPs"], 2), []).append(row["top-1"])
        at = sorted(points)
        means = [statistics.mean(points[flops]) for flops in at]
        beyond = [
            [mean - min(points[x]) for x, mean in zip(at, means)],
            [max(points[x]) - mean for x, mean in zip(at, means)],
        ]
        bold = {"linewidth": 2.4} if method.startswith("Cropr") else {"linewidth": 1.2, "alpha": 0.8}
        axis.errorbar(at, means, beyond, marker="o", markersize=4, capsize=2, label=method, **bold)
    plain = [row["top-1"] for row in rows if row["method"] == "no pruning"]
    axis.axhline(statistics.mean(plain), color="0.4", linewidth=0.8, label="no pruning")
    axis.set_xlabel("GFLOPs")
    axis.set_ylabel("top-1 after 50 steps, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title("ViT-Ti/16, Tiny-ImageNet: mean, and range over seeds", fontsize=9)
    figure.savefig(DOCS / "accuracy.png", dpi=130)
    plt.close(figure)
