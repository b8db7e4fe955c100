"""The sections, pictures and CSV files of docs/comparison.md: every system of the paper's tables
beside Cropr."""

import json
import statistics
from typing import Any

from benchmarks.baselines.registry import BASELINES, FUSIONS, ROWS, UNPRUNED
from benchmarks.report import off_the_shelf
from benchmarks.report.render import (
    NOT_MEASURED,
    Cell,
    Files,
    Sections,
    Spread,
    Table,
    link,
    load,
    source,
    where,
)
from benchmarks.utils.plots import label_points, plot_latency_curve, pyplot
from benchmarks.utils.results import DOCS, RESULTS

ACCURACY_MODEL = "vit_tiny_patch16_224"  # the one that is trained
TRAINED_AS = {baseline.name: baseline.trained_as for baseline in BASELINES if baseline.trained_as}
STAGES = {
    "block": "after the block",
    "attention": "before the MLP",
    "queries": "before the attention",
}
NEEDS = {
    "attention": "all of the attention",
    "class row": "one row of the attention",
    "keys": "keys",
    "values": "values",
    "patches": "the input",
    "update": "what the MLP adds",
}
# The table that opens the page: as named off the shelf, and as in the table of systems.
SUMMARY = {
    "no pruning": ("", "unpruned"),
    "random": ("random", "random"),
    "EViT": ("EViT", "EViT"),
    "SAINT": ("SAINT", "SAINT"),
    "ToMe": ("ToMe", "ToMe"),
    "ATM": ("ATM", "ATM"),
    "**Cropr, dropping**": ("calibrated", "Cropr"),
    "**Cropr, merging**": ("merge", "Cropr, merging"),
}
SUMMARY_RATE = 8
Timed = dict[str, dict[str, Any]]  # by system, a row of the table


def systems() -> Table:
    """Table of systems: tokens kept, position in the block, requirements."""
    body: list[list[Cell]] = []
    for baseline in BASELINES:
        if baseline.variant:
            continue
        reducer = baseline.make(8, 2, 4)
        stage = STAGES[reducer.insertion_point] + (", once" if baseline.category == "once" else "")
        needs = ", ".join(NEEDS[need] for need in sorted(reducer.needs))
        body.append([baseline.name, baseline.keeps, stage, needs])
    body.append(["Cropr", "the highest product with one learned query", STAGES["block"], ""])
    return Table(["system", "kept", "acts", "needs"], body)


def trained(system: str, schedule: str) -> list[float]:
    """Top-1 of all seeds, of the systems trained for 1.7 times fewer FLOPs."""
    measured = load("accuracy")
    name = TRAINED_AS.get(system, system)
    if system == "Cropr":
        name = f"Cropr, {schedule}".replace(", dec", "")
    elif "LLF" in schedule:
        name = f"{system}, LLF"
    rows = [] if measured is None else where(measured[1], method=name)
    return [row["top-1"] for row in rows if row["group"] in ("main", "baselines")]


def timed(group: str) -> tuple[dict[str, Any], dict[tuple[str, int, int], Timed]] | None:
    """Environment; by model, size and batch the rows of a group by system. A GPU's if there are
    any."""
    for device in ("cuda", "cpu"):
        measured = load(f"{device}_table")
        if measured is None:
            continue
        tables: dict[tuple[str, int, int], Timed] = {}
        for row in where(measured[1], group=group, mode="eager"):
            tables.setdefault((row["model"], row["size"], row["batch"]), {})[row["system"]] = row
        if tables:
            return measured[0], tables
    return None


def ratio(row: dict[str, Any] | None) -> str:
    return f"{row['speed-up']:.2f}x" if row is not None and "speed-up" in row else "-"


def summary() -> str:
    """One line a method: without training at one rate, and after a short training."""
    timings = timed("classification")
    if timings is None or load("off_the_shelf") is None:
        return NOT_MEASURED
    tables = timings[1]
    batches = {
        batch: table for (model, _, batch), table in tables.items() if model == ACCURACY_MODEL
    }
    body: list[list[Cell]] = []
    for label, (untrained, system) in SUMMARY.items():
        agreement, speed = (
            off_the_shelf.means(untrained, SUMMARY_RATE) if untrained else ([100.0, 100.0], 1.0)
        )
        accuracies = trained(label if system == "unpruned" else system, "dec")
        rows = [
            table.get(system if system == "unpruned" else f"{system} | dec")
            for table in batches.values()
        ]
        line: list[Cell] = [
            label,
            *(f"{value:.1f}" for value in agreement),
            f"{speed:.2f}x" if speed else "-",
        ]
        body.append([*line, Spread(accuracies, 1) if accuracies else "-", *map(ratio, rows)])
    head = ["method", "agreement, %", "Imagenette, %", "speed", "top-1 trained, %"]
    head += [f"speed, batch {batch}" for batch in batches]
    note = (
        f"*ViT-Ti/16 at 224 px. Columns 2 to 4: no training, R = {SUMMARY_RATE}, agreement on "
        "Tiny-ImageNet and on "
        "Imagenette, speed at batch 8. Columns 5 to 7: 50 steps of training on Tiny-ImageNet at R "
        "= 14, 1.7 times "
        f"fewer FLOPs, mean and range of three seeds. Speed: over no pruning on the engine.*"
    )
    return f"{Table(head, body).markdown()}\n\n{note}"


def classification() -> Table | None:
    """Every system at every schedule of both models."""
    timings = timed("classification")
    if timings is None:
        return None
    tables = timings[1]
    batches = sorted({batch for _, _, batch in tables})
    body: list[list[Cell]] = []
    for model in dict.fromkeys(model for model, _, _ in tables):
        by_batch = {batch: table for (name, _, batch), table in tables.items() if name == model}
        largest = by_batch[max(by_batch)]
        for system, schedule, published in (("unpruned", "", UNPRUNED), *ROWS):
            row = largest.get(f"{system} | {schedule}" if schedule else system)
            if row is None:
                continue
            name = "no pruning" if system == "unpruned" else system
            accuracies = trained(name, schedule) if model == ACCURACY_MODEL else []
            line: list[Cell] = [model, name, schedule or "-"]
            line += [ratio(by_batch.get(batch, {}).get(row["system"])) for batch in batches]
            line += [f"{row['GFLOPs']:.2f}", f"{row['peak MiB']:.0f}"]
            line.append(Spread(accuracies, 1) if accuracies else "-")
            line += (
                [f"{published[1] / UNPRUNED[1]:.1f}x", f"{published[0]:.1f}"]
                if published
                else ["-", "-"]
            )
            body.append(line)
    head = [
        "model",
        "system",
        "schedule",
        *(f"speed-up, batch {batch}" for batch in batches),
        "GFLOPs",
        "MiB",
    ]
    return Table([*head, "top-1, %", "published speed-up", "published top-1, %"], body)


def classification_section() -> str:
    timings = timed("classification")
    if timings is None:
        return NOT_MEASURED
    environment, _ = timings
    device_table = "cpu_table" if environment["threads"] else "cuda_table"
    return (
        f"All figures: {link('classification', classification())}. Speed-up over no pruning on "
        "the engine, medians of "
        "calls that take turns in shuffled order; MiB: the most that one forward of the larger "
        "batch holds beside "
        f"weights and images; published: ViT-L, ImageNet-1k, by the paper. "
        f"{source(device_table, environment)}, also of the next three sections."
    )


def fusions() -> Table | None:
    timings, accuracy = timed("fusions"), load("segmentation")
    if timings is None:
        return None
    tables = timings[1]
    unpruned = next(iter(tables.values()))["unpruned"]
    body: list[list[Cell]] = []
    for name, fusion in FUSIONS.items():
        rows = [table[name] for table in tables.values()]
        trainings = (
            []
            if accuracy is None
            else [row["mIoU"] for row in where(accuracy[1], method=fusion.name)]
        )
        body.append(
            [
                fusion.name,
                *map(ratio, rows),
                f"{rows[-1]['GFLOPs']:.1f}",
                f"{unpruned['GFLOPs'] / rows[0]['GFLOPs']:.2f}x",
                f"{rows[-1]['peak MiB']:.0f}",
                Spread(trainings, 1) if trainings else "-",
                f"{FUSIONS['unpruned'].gflops / fusion.gflops:.2f}x",
                f"{fusion.miou:.1f}",
            ]
        )
    head = [
        "fusion",
        *(f"speed-up, batch {batch}" for _, _, batch in tables),
        "GFLOPs",
        "FLOPs fewer",
        "MiB",
    ]
    return Table([*head, "CamVid mIoU, %", "published FLOPs fewer", "published mIoU, %"], body)


def fusions_section() -> str:
    timings = timed("fusions")
    if timings is None:
        return NOT_MEASURED
    model, size, _ = next(iter(timings[1]))
    return (
        f"{link('fusions', fusions())}: {model} at {size} px, patches of 16, up to the logits of "
        "the patches. mIoU: "
        "the ViT-Ti of [training results](training-results.md#segmentation), pruned less. "
        "Published: EVA-02-L, ADE20k."
    )


def scorer() -> Table | None:
    """GFLOPs and speed-up of each scorer."""
    timings = timed("architecture")
    if timings is None:
        return None
    body: list[list[Cell]] = []
    for (model, _, batch), table in timings[1].items():
        for name in (
            "simple",
            "simple, as published",
            "several heads, folded",
            "several heads, as published",
        ):
            body.append(
                [model, str(batch), name, f"{table[name]['GFLOPs']:.2f}", ratio(table[name])]
            )
    return Table(["model", "batch", "scorer", "GFLOPs", "speed-up"], body)


def scorer_section() -> str:
    if timed("architecture") is None:
        return NOT_MEASURED
    return (
        f"{link('scorer', scorer())}. Published: several heads 36.8 GFLOPs, 1352 images/s; simple "
        "34.2, 1476 images/s."
    )


def precision() -> Table | None:
    """Speed-up of each precision and kind of attention."""
    timings = timed("precision")
    if timings is None:
        return None
    tables = timings[1]
    body: list[list[Cell]] = []
    for key in next(iter(tables.values())):
        if " | " in key:
            system, mode = key.split(" | ")
            name = "no pruning" if system == "unpruned" else system
            body.append([mode, name, *(ratio(table.get(key)) for table in tables.values())])
    return Table(
        ["precision", "system", *(f"{size} px, batch {batch}" for _, size, batch in tables)], body
    )


def precision_section() -> str:
    timings, table = timed("precision"), precision()
    if timings is None or table is None:
        return NOT_MEASURED
    return (
        f"{link('precision', table)}: speed-up of {next(iter(timings[1]))[0]} over no pruning in "
        "float32 with the "
        "attention's probabilities written out, at that size."
    )


def plot_comparison() -> None:
    """Top-1 after a short training against measured speed-up, one point a row of the table."""
    timings = timed("classification")
    if timings is None:
        return
    plt = pyplot()
    tables = timings[1]
    table = tables[max(key for key in tables if key[0] == ACCURACY_MODEL)]
    colors = {
        "dec": "tab:blue",
        "dec, LLF": "tab:green",
        "const": "tab:orange",
        "const, LLF": "tab:red",
    }
    meanings = {
        "dec": "tokens are pruned after each block",
        "dec, LLF": "the same, all restored before the last block (LLF)",
        "const": "tokens are pruned once",
        "const, LLF": "the same, all restored before the last block (LLF)",
    }
    figure, axis = plt.subplots(figsize=(8, 5.4), layout="constrained")
    points = []
    for system, schedule, _ in ROWS:
        row, accuracies = table.get(f"{system} | {schedule}"), trained(system, schedule)
        if row is None or not accuracies or statistics.mean(accuracies) < 40:
            continue
        x, y = row["speed-up"], statistics.mean(accuracies)
        is_cropr = system.startswith("Cropr")
        axis.scatter(
            x, y, color=colors[schedule], marker="*" if is_cropr else "o", s=120 if is_cropr else 30
        )
        points.append((x, y, system))
    for label, color in colors.items():
        axis.scatter([], [], color=color, label=f"{label}: {meanings[label]}")
    axis.axhline(
        statistics.mean(trained("no pruning", "")), color="0.4", linewidth=0.8, label="no pruning"
    )
    axis.set_xlabel("speed-up, measured")
    axis.set_ylabel("top-1 after a short training, %")
    axis.grid(alpha=0.3)
    axis.margins(0.1, 0.08)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    axis.set_title("ViT-Ti/16, Tiny-ImageNet; below 40 %: not shown", fontsize=9)
    label_points(axis, points)
    figure.savefig(DOCS / "comparison.png", dpi=130)
    plt.close(figure)


def plot_curve() -> None:
    for path in sorted(RESULTS.glob("*_latency_curve*.json"))[-1:]:  # cuda sorts after cpu
        data = json.loads(path.read_text())
        plot_latency_curve(DOCS / "latency_curve.png", data["rows"], data["environment"])


def plot() -> None:
    """The pictures of the page that are of no other section."""
    plot_comparison()
    plot_curve()


SECTIONS: Sections = {
    "summary": summary,
    "classification": classification_section,
    "fusions": fusions_section,
    "scorer": scorer_section,
    "precision": precision_section,
}
FILES: Files = {
    "systems": systems,
    "classification": classification,
    "fusions": fusions,
    "scorer": scorer,
    "precision": precision,
}
