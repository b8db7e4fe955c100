"""The sections and the picture of docs/benchmarks.md: prune, whole networks, merging, digits."""

import statistics
from collections import Counter

from benchmarks.report.comparison import LABELS
from benchmarks.report.render import Sections, grid, spread, where
from benchmarks.utils.plots import pyplot
from benchmarks.utils.results import DOCS, load


def cpu_ops() -> str:
    found = load("cpu_ops")
    if found is None:
        return "Not measured yet."
    env, rows = found
    columns = [name for name in rows[0] if " / " in name and "spread" not in name]
    body = [
        [row["model"], "x".join(map(str, row["shape"])), row["dtype"], *(f"{row[name]:.2f}" for name in columns)]
        for row in rows
    ]
    return (
        grid(["", "x", "dtype", *columns], body)
        + f"\n\n{where(env)}; medians; the baselines take turns of 2 ms in shuffled order."
    )


def end_to_end(device: str) -> str:
    found = load(f"{device}_end_to_end")
    if found is None:
        return "Not measured yet." if device == "cpu" else "GPU: not measured yet."
    env, rows = found
    body = [
        [
            row["model"],
            row["method"],
            f"{row['speed_up']:.2f}x",
            f"{row['gflops']:.1f}",
            f"{row['flop_ratio']:.2f}x",
            f"{100 * row['pruning_share']:.1f} %" if row["pruning_share"] else "-",
        ]
        for row in rows
    ]
    head = ["model", "method", "speed-up", "GFLOPs", "FLOP ratio", "time in pruning"]
    return grid(head, body) + f"\n\n{where(env)}; batch {env['batch']}, {env['dtype']}, random weights."


def digits() -> str:
    found = load("digits")
    if found is None:
        return "Not measured yet."
    env, rows = found
    body = []
    for method in ("no pruning", "Cropr"):
        own = [row for row in rows if row["method"] == method]
        values = [row["accuracy"] for row in own]
        body.append(
            [
                method,
                f"{100 * own[0]['token share']:.0f} %",
                f"{statistics.mean(values):.1f} %",
                ", ".join(f"{value:.1f}" for value in values),
            ]
        )
    return grid(["method", "tokens per block", "accuracy", "seeds"], body) + f"\n\n{where(env)}."


def networks(name: str) -> str:
    found = load(name)
    if found is None:
        return "Not measured yet."
    env, rows = found
    methods = [key.removeprefix("unpruned / ") for key in rows[0] if key.startswith("unpruned / ")]
    methods = [name for name in methods if name != "unpruned"]
    body = [
        [row["model"], str(row["batch"]), row["dtype"], row["mode"]]
        + [f"{row[key]:.2f}" if (key := f"unpruned / {name}") in row else "-" for name in methods]
        for row in rows
    ]
    note = "medians; the methods take turns in shuffled order; random weights"
    return grid(["model", "batch", "dtype", "mode", *methods], body) + f"\n\n{where(env)}; {note}."


PARTS = {
    "merge": "**as it is** (3 R candidates)",
    "merge, none of these": "1.5 R candidates, no checkerboard, similarity alone, norms of means, whole sizes",
}


def merging() -> str:
    """What each part of merging is good for."""
    found = load("off_the_shelf")
    if found is None:
        return "Not measured yet."
    env, rows = found
    rows = [row for row in rows if row["method"].startswith("merge")]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    shared = Counter((row["data"], row["rate"], row["seed"]) for row in rows)
    rows = [row for row in rows if shared[row["data"], row["rate"], row["seed"]] == len(methods)]
    data, rates, seeds = (list(dict.fromkeys(row[key] for row in rows)) for key in ("data", "rate", "seed"))
    cells = [(name, rate) for name in data for rate in rates]
    body = []
    for method in methods:
        line = [PARTS.get(method, method.removeprefix("merge, "))]
        for name, rate in cells:
            own = [row for row in rows if (row["data"], row["rate"], row["method"]) == (name, rate, method)]
            agreement, divergence = (statistics.mean(row[key] for row in own) for key in ("agreement", "KL"))
            line.append(f"{agreement:.1f} %, {divergence:.3f}")
        body.append(line)
    head = ["merging", *(f"{name}, R = {rate}" for name, rate in cells)]
    same = f"{env['photos']} photos of each of the seeds {', '.join(map(str, seeds))}"
    return grid(head, body) + f"\n\nAgreement and KL with the unpruned model, {same}. {where(env)}."


def calibration_target() -> str:
    """KL with the largest later attention as the target of calibration, against that with its mean."""
    found = load("calibration_target")
    if found is None:
        return "Not measured yet."
    env, rows = found
    body = []
    for method, data in dict.fromkeys((row["method"], row["data"]) for row in rows):
        line = [LABELS[method].strip("*"), data]
        for rate in sorted({row["rate"] for row in rows}):
            own = [row for row in rows if (row["method"], row["data"], row["rate"]) == (method, data, rate)]
            values = [
                statistics.mean(row["KL"] for row in own if row["target"] == target) for target in ("mean", "largest")
            ]
            line.append(f"{values[0]:.3f}, {values[1]:.3f}")
        body.append(line)
    head = ["", "", *(f"R = {rate}" for rate in sorted({row["rate"] for row in rows}))]
    return grid(head, body) + f"\n\nKL with the mean, with the largest; mean of the same seeds. {where(env)}."


def finetune() -> str:
    found = load("finetune")
    if found is None:
        return "Not measured yet."
    env, rows = found
    body = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        line = [method, str(own[0]["rate"])]
        body.append([*line, *(spread([row[key] for row in own], 1) for key in ("top-1 before", "top-1 after"))])
    seeds = len({row["seed"] for row in rows})
    note = (
        f"Tiny-ImageNet, ViT-Ti/16 at 224 px, {seeds} seeds; one epoch over {env['photos']} photos, AdamW, "
        f"learning rate {env['learning_rate']}, batch {env['batch']}, calibrated queries fixed; top-1 in % on "
        f"{env['compare']} others; mean, and range over seeds."
    )
    return grid(["pruned by", "R", "before", "after"], body) + f"\n\n{note} {where(env)}."


def gpu_ops() -> str:
    found = load("gpu_ops")
    if found is None:
        return "GPU: not measured yet. `bash benchmarks/run_gpu.sh` runs the tests and measures."
    env, rows = found
    columns = [name for name in rows[0] if " / " in name]
    body = [
        [row["model"], "x".join(map(str, row["shape"])), row["dtype"], row["L2"], f"{row['prune, us']}"]
        + [f"{row[name]:.2f}" if name in row else "-" for name in columns]
        for row in rows
    ]
    return grid(["", "x", "dtype", "L2", "prune, us", *columns], body) + f"\n\n{where(env)}."


def launch_cost() -> str:
    found = load("launch_cost")
    if found is None:
        return "Not measured yet."
    env, rows = found
    body = [[f"`{row['op']}`", f"{row['triton']:.1f}", f"{row['plan']:.1f}"] for row in rows]
    return grid(["op", "through Triton", "from its plan"], body) + f"\n\n{where(env)}; the least of 50 rounds."


SECTIONS: Sections = {
    "launch_cost": launch_cost,
    "cpu_ops": cpu_ops,
    "cpu_end_to_end": lambda: end_to_end("cpu"),
    "cuda_end_to_end": lambda: end_to_end("cuda"),
    "digits": digits,
    "merging": merging,
    "finetune": finetune,
    "calibration_target": calibration_target,
    "cpu_networks": lambda: networks("cpu_networks"),
    "cpu_merging": lambda: networks("cpu_merging"),
    "gpu_ops": gpu_ops,
}


def plot() -> None:
    """How much faster than each baseline, per shape."""
    found = load("cpu_ops")
    if found is None:
        return
    plt = pyplot()
    env, rows = found
    names = [name for name in rows[0] if name.endswith(" / prune")]
    labels = ["x".join(map(str, row["shape"])) + "\n" + row["dtype"] for row in rows]
    figure, axis = plt.subplots(figsize=(10, 3.6), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [place + (i - (len(names) - 1) / 2) * width for place in range(len(rows))]
        axis.bar(places, [row[name] for row in rows], width, label=name.removesuffix(" / prune"))
    axis.axhline(1.0, color="0.3", linewidth=0.8)
    axis.set_xticks(range(len(rows)), labels, fontsize=7)
    axis.set_ylabel("time over that of cropr::prune")
    axis.set_title(f"cropr::prune on {env['device']}, {env['threads']} thread", fontsize=10)
    axis.legend(fontsize=8)
    figure.savefig(DOCS / "cpu_ops.png", dpi=130)
    plt.close(figure)
