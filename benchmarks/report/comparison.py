"""The sections and pictures of docs/comparison.md: every system of the paper's tables beside Cropr."""

import json
import statistics
from typing import Any

from benchmarks.baselines.registry import BASELINES, FUSIONS, OFF_THE_SHELF, ROWS, UNPRUNED
from benchmarks.report.render import Sections, grid, spread, where
from benchmarks.utils.plots import label_points, plot_latency_curve, pyplot
from benchmarks.utils.results import DOCS, RESULTS, load

ACCURACY_MODEL = "vit_tiny_patch16_224"  # what is trained
TRAINED_AS = {baseline.name: baseline.trained_as for baseline in BASELINES if baseline.trained_as}
PLACES = {"block": "after the block", "attention": "before the MLP", "queries": "before the attention"}
NEEDS = {
    "attention": "the whole attention",
    "class row": "one row of the attention",
    "keys": "keys",
    "values": "values",
    "patches": "the input",
    "update": "what the MLP adds",
}


def systems() -> str:
    """What each system keeps, where in a block it acts and what it needs there."""
    body = []
    for baseline in BASELINES:
        if baseline.variant:
            continue
        reducer = baseline.make(8, 2, 4)
        place = PLACES[reducer.insertion_point] + (", once" if baseline.category == "once" else "")
        body.append([baseline.name, baseline.keeps, place, ", ".join(NEEDS[need] for need in sorted(reducer.needs))])
    body.append(["Cropr", "the highest product with one learned query", PLACES["block"], ""])
    return grid(["system", "what is kept", "acts", "needs"], body)


def trained(system: str, schedule: str) -> list[float]:
    """Top-1 of all seeds, of the systems trained for 1.7 times fewer FLOPs."""
    found = load("accuracy")
    name = TRAINED_AS.get(system, system)
    if system == "Cropr":
        name = f"Cropr, {schedule}".replace(", dec", "")
    elif "LLF" in schedule:
        name = f"{system}, LLF"
    rows = [] if found is None else found[1]
    return [row["top-1"] for row in rows if row["group"] in ("main", "baselines") and row["method"] == name]


def cells(group: str) -> tuple[dict[str, Any], dict[tuple[str, int, int], dict[str, Any]]] | None:
    """Environment; by model, size and batch the rows of a group by system. A GPU's, where there are any."""
    for device in ("cuda", "cpu"):
        found = load(f"{device}_table")
        if found is None:
            continue
        tables: dict[tuple[str, int, int], dict[str, Any]] = {}
        for row in found[1]:
            if row["group"] == group and row["mode"] == "eager":
                tables.setdefault((row["model"], row["size"], row["batch"]), {})[row["system"]] = row
        if tables:
            return found[0], tables
    return None


def ratio(row: dict[str, Any] | None) -> str:
    return f"{row['speed-up']:.2f}x" if row is not None and "speed-up" in row else "-"


def classification() -> str:
    found = cells("classification")
    if found is None:
        return "Not measured yet."
    env, tables = found
    parts = []
    for model in dict.fromkeys(key[0] for key in tables):
        batches = {batch: table for (name, _, batch), table in tables.items() if name == model}
        last = batches[max(batches)]
        known = model == ACCURACY_MODEL
        body = []
        for system, schedule, published in (("unpruned", "", UNPRUNED), *ROWS):
            row = last.get(f"{system} | {schedule}" if schedule else system)
            if row is None:
                continue
            accuracies = trained("no pruning" if system == "unpruned" else system, schedule) if known else []
            line = [system if system != "unpruned" else "no pruning", schedule or "-"]
            line += [ratio(table.get(row["system"])) for table in batches.values()]
            line += [f"{row['GFLOPs']:.2f}", f"{row['peak MiB']:.0f}"]
            line += ([spread(accuracies, 1) if accuracies else "-"]) if known else []
            line += [f"{published[1] / UNPRUNED[1]:.1f}x", f"{published[0]:.1f}"] if published else ["-", "-"]
            if system.startswith("Cropr"):
                line[0] = f"**{system}**"
            body.append(line)
        head = ["system", "schedule", *(f"speed-up, batch {batch}" for batch in batches), "GFLOPs", "MiB"]
        head += [*(["top-1, %"] if known else []), "published speed-up", "published top-1, %"]
        parts.append(f"{model}:\n\n{grid(head, body)}")
    note = (
        "Speed-up over the unpruned network on the engine, medians of calls that take turns in shuffled order; MiB: "
        "the most that one forward of the larger batch holds beside weights and images; published: ViT-L, "
        "ImageNet-1k, by the paper."
    )
    return "\n\n".join(parts) + f"\n\n{note} {where(env)}."


def fusions() -> str:
    found, accuracy = cells("fusions"), load("segmentation")
    if found is None:
        return "Not measured yet."
    env, tables = found
    (model, size, _), first = next(iter(tables.items()))
    body = []
    for name, fusion in FUSIONS.items():
        rows = [table[name] for table in tables.values()]
        own = [] if accuracy is None else [row["mIoU"] for row in accuracy[1] if row["method"] == fusion.name]
        line = [fusion.name, *(ratio(row) for row in rows), f"{rows[-1]['GFLOPs']:.1f}"]
        line += [f"{first['unpruned']['GFLOPs'] / rows[0]['GFLOPs']:.2f}x", f"{rows[-1]['peak MiB']:.0f}"]
        line += [
            spread(own, 1) if own else "-",
            f"{FUSIONS['unpruned'].gflops / fusion.gflops:.2f}x",
            f"{fusion.miou:.1f}",
        ]
        body.append(line)
    batches = [batch for _, _, batch in tables]
    head = ["fusion", *(f"speed-up, batch {batch}" for batch in batches), "GFLOPs", "FLOP ratio", "MiB"]
    head += ["CamVid mIoU, %", "published FLOP ratio", "published mIoU, %"]
    note = (
        f"{model} at {size} px, patches of 16, up to the logits of the patches. mIoU: the ViT-Ti of "
        "[training-results.md](training-results.md#segmentation), pruned less. Published: EVA-02-L, ADE20k."
    )
    return grid(head, body) + f"\n\n{note} {where(env)}."


def architecture() -> str:
    found = cells("architecture")
    if found is None:
        return "Not measured yet."
    env, tables = found
    body = []
    for name in ("simple", "simple, as published", "several heads, folded", "several heads, as published"):
        rows = [table[name] for table in tables.values()]
        body.append([name, *(f"{row['GFLOPs']:.2f}, {ratio(row)}" for row in rows)])
    head = ["scorer", *(f"{model}, batch {batch}" for model, _, batch in tables)]
    note = (
        "GFLOPs, and speed-up over no pruning. Published: several heads 36.8 GFLOPs, 1352 images/s; simple 34.2, 1476."
    )
    return grid(head, body) + f"\n\n{note} {where(env)}."


def precision() -> str:
    found = cells("precision")
    if found is None:
        return "Not measured yet."
    env, tables = found
    body = []
    for key in next(iter(tables.values())):
        if " | " in key:
            system, mode = key.split(" | ")
            system = "no pruning" if system == "unpruned" else system
            body.append([mode, system, *(ratio(table.get(key)) for table in tables.values())])
    model = next(iter(tables))[0]
    head = ["precision", "system", *(f"{size} px, batch {batch}" for _, size, batch in tables)]
    note = f"{model}; over no pruning in float32 with the attention's probabilities written out, at that size."
    return grid(head, body) + f"\n\n{note} {where(env)}."


MAIN = (*OFF_THE_SHELF, "calibrated", "merge")
FAR_BELOW = ("ATS", "pixel variance")  # the others
PLOTTED = [name for name in MAIN if name not in (*(one.name for one in BASELINES if one.variant), *FAR_BELOW)]
LABELS = {"calibrated": "calibrated, dropping", "merge": "**calibrated, merging**"}


def speeds() -> dict[tuple[int, str], float]:
    found = load("off_the_shelf_speed")
    return {} if found is None else {(row["rate"], row["method"]): row["speed-up"] for row in found[1]}


def off_the_shelf() -> str:
    """Agreement and KL by data set, with the speed measured apart."""
    found = load("off_the_shelf")
    if found is None:
        return "Not measured yet."
    env, rows = found
    data, speed = list(dict.fromkeys(row["data"] for row in rows)), speeds()
    body = []
    for rate in sorted({row["rate"] for row in rows}):
        for method in [name for name in MAIN if any(row["method"] == name for row in rows)]:
            line = [str(rate), LABELS.get(method, method)]
            for name in data:
                own = [row for row in rows if (row["data"], row["rate"], row["method"]) == (name, rate, method)]
                line += [spread([row["agreement"] for row in own], 1), spread([row["KL"] for row in own], 3)]
                if all("top-1" in row for row in own):
                    line.append(f"{statistics.mean(row['top-1'] for row in own):.1f}")
            body.append([*line, f"{speed[rate, method]:.2f}x" if (rate, method) in speed else "-"])
    labelled = {row["data"] for row in rows if "top-1" in row}
    columns = {
        name: ("agreement, %", "KL", "top-1, %") if name in labelled else ("agreement, %", "KL") for name in data
    }
    head = ["R", "method", *(f"{name}, {what}" for name in data for what in columns[name]), "speed-up"]
    ours = [row for row in rows if row["method"] == "merge"]
    plain = statistics.mean(row["top-1 unpruned"] for row in ours if "top-1" in row)
    note = (
        f"ViT-Ti/16 at 224 px, unpruned top-1 {plain:.1f} %. Agreement and KL are with the unpruned model; "
        f"{len({row['seed'] for row in ours})} seeds, each with {env['photos']} photos to calibrate on and as many "
        "others to compare on; mean, and range over seeds."
    )
    timed = load("off_the_shelf_speed")
    if timed is not None:
        env_timed = timed[0]
        note += f" Speed-up over the unpruned model on the engine: batch {env_timed['batch']}, {where(env_timed)}."
    return grid(head, body) + f"\n\n{note} {where(env)}."


def plot_off_the_shelf() -> None:
    """Agreement against measured speed-up, one panel a data set, one line a method over its rates; dashed: drops."""
    found, speed = load("off_the_shelf"), speeds()
    if found is None or not speed:
        return
    plt = pyplot()
    rows = found[1]
    data = list(dict.fromkeys(row["data"] for row in rows))
    figure, axes = plt.subplots(1, len(data), figsize=(5.2 * len(data), 3.8), layout="constrained", squeeze=False)
    drops = [one.name for one in BASELINES if one.category == "pruning" and one.name in PLOTTED]
    merges = [name for name in PLOTTED if name not in (*drops, "calibrated", "merge")]
    colours = [f"C{i}" for i in range(10) if i != 3]  # red is ours
    styles: dict[str, dict[str, Any]] = {"calibrated": {"color": "C3", "linestyle": "--", "linewidth": 2.4}}
    styles["merge"] = {"color": "C3", "linewidth": 2.4}
    for names, line in ((drops, "--"), (merges, "-")):
        styles |= {name: {"color": colour, "linestyle": line} for name, colour in zip(names, colours)}
    for axis, name in zip(axes[0], data):
        for method in PLOTTED:
            points = []
            for rate in sorted({row["rate"] for row in rows}):
                own = [row for row in rows if (row["data"], row["rate"], row["method"]) == (name, rate, method)]
                if own and (rate, method) in speed:
                    points.append((speed[rate, method], statistics.mean(row["agreement"] for row in own)))
            if not points:  # not measured yet
                continue
            label = LABELS.get(method, method).strip("*")
            axis.plot(*zip(*points), marker="o", markersize=4, label=label, **styles[method])
        axis.set_title(f"{name} (dashed: drops tokens)", fontsize=10)
        axis.set_xlabel("speed-up, measured")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("agreement with the unpruned model, %")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    timed: Any = load("off_the_shelf_speed")
    figure.suptitle(f"ViT-Ti/16, no training; speed: {where(timed[0])}", fontsize=9)
    figure.savefig(DOCS / "off_the_shelf.png", dpi=130)
    plt.close(figure)


def plot_comparison() -> None:
    """Top-1 after a short training against measured speed-up, one point a row of the table."""
    found = cells("classification")
    if found is None:
        return
    plt = pyplot()
    _, tables = found
    table = tables[max(key for key in tables if key[0] == ACCURACY_MODEL)]
    colours = {"dec": "tab:blue", "dec, LLF": "tab:green", "const": "tab:orange", "const, LLF": "tab:red"}
    means = {
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
        at = row["speed-up"], statistics.mean(accuracies)
        ours = system.startswith("Cropr")
        axis.scatter(*at, color=colours[schedule], marker="*" if ours else "o", s=120 if ours else 30)
        points.append((*at, system))
    for schedule, colour in colours.items():
        axis.scatter([], [], color=colour, label=f"{schedule}: {means[schedule]}")
    axis.axhline(statistics.mean(trained("no pruning", "")), color="0.4", linewidth=0.8, label="no pruning")
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
    for path in sorted(RESULTS.glob("*_latency_curve*.json"))[-1:]:  # cuda sorts behind cpu
        data = json.loads(path.read_text())
        plot_latency_curve(DOCS / "latency_curve.png", data["rows"], data["environment"])


def plot() -> None:
    """All pictures of the page."""
    plot_off_the_shelf()
    plot_comparison()
    plot_curve()


SECTIONS: Sections = {
    "systems": systems,
    "classification": classification,
    "fusions": fusions,
    "architecture": architecture,
    "precision": precision,
    "off_the_shelf": off_the_shelf,
}
