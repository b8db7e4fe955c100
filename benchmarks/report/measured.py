"""The sections, picture and CSV files of docs/benchmarks.md: prune, whole networks, merging,
digits."""

from collections import Counter

from benchmarks.report.off_the_shelf import LABELS
from benchmarks.report.render import (
    NOT_MEASURED,
    Cell,
    Files,
    Sections,
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

NETWORKS = ("cpu_networks", "cpu_merging")


def cpu_ops() -> Table | None:
    """Ratios of every shape and dtype."""
    measured = load("cpu_ops")
    if measured is None:
        return None
    rows = measured[1]
    columns = [name for name in rows[0] if " / " in name and "spread" not in name]
    body: list[list[Cell]] = [
        [
            row["model"],
            "x".join(map(str, row["shape"])),
            row["dtype"],
            *(f"{row[name]:.2f}" for name in columns),
        ]
        for row in rows
    ]
    return Table(["model", "x", "dtype", *columns], body)


def cpu_ops_section() -> str:
    measured, table = load("cpu_ops"), cpu_ops()
    if measured is None or table is None:
        return NOT_MEASURED
    shown = Table(table.head, [row for row in table.rows if "float32" in row])
    shown = shown.select([name for name in table.head if name not in ("model", "dtype")])
    return (
        f"{shown.markdown()}\n\nfloat32, medians; the baselines take turns of 2 ms in shuffled "
        "order. "
        f"{measured_on(measured[0])}. With bfloat16: {link('cpu_ops', table)}."
    )


def end_to_end(device: str) -> Table | None:
    """Speed-up over the plain model, and the share of time that pruning takes."""
    measured = load(f"{device}_end_to_end")
    if measured is None:
        return None
    body: list[list[Cell]] = [
        [
            row["model"],
            row["method"],
            f"{row['speed_up']:.2f}x",
            f"{row['gflops']:.1f}",
            f"{row['flop_ratio']:.2f}x",
            f"{100 * row['pruning_share']:.1f} %" if row["pruning_share"] else "-",
        ]
        for row in measured[1]
    ]
    return Table(["model", "method", "speed-up", "GFLOPs", "FLOPs fewer", "time in pruning"], body)


def end_to_end_section(device: str) -> str:
    measured, table = load(f"{device}_end_to_end"), end_to_end(device)
    if measured is None or table is None:
        return NOT_MEASURED if device == "cpu" else "GPU: not measured yet."
    env = measured[0]
    note = f"Batch {env['batch']}, {env['dtype']}, random weights. {measured_on(env)}"
    return f"{link(f'{device}_end_to_end', table)}: {note}."


def digits() -> str:
    """Accuracy of both methods, in a sentence."""
    measured = load("digits")
    if measured is None:
        return NOT_MEASURED
    env, rows = measured
    unpruned, pruned = where(rows, method="no pruning"), where(rows, method="Cropr")
    return (
        f"No pruning {spread(unpruned, 'accuracy', 1)} %, Cropr {spread(pruned, 'accuracy', 1)} % "
        "with "
        f"{100 * pruned[0]['token share']:.0f} % of the tokens per block; {len(pruned)} seeds. "
        f"{measured_on(env)}."
    )


def networks(name: str) -> Table | None:
    """Times the speed of the unpruned network on the engine."""
    measured = load(name)
    if measured is None:
        return None
    rows = measured[1]
    prefix = "unpruned / "
    methods = [
        key.removeprefix(prefix)
        for key in rows[0]
        if key.startswith(prefix) and key != f"{prefix}unpruned"
    ]
    body: list[list[Cell]] = [
        [
            *(str(row[key]) for key in ("model", "batch", "dtype", "mode")),
            *(
                f"{row[prefix + method]:.2f}" if prefix + method in row else "-"
                for method in methods
            ),
        ]
        for row in rows
    ]
    return Table(["model", "batch", "dtype", "mode", *methods], body)


def networks_section() -> str:
    """Links to both files."""
    notes = []
    for name in NETWORKS:
        measured = load(name)
        if measured is not None:
            notes.append(f"{link(name, networks(name))}: {measured_on(measured[0])}.")
    if not notes:
        return NOT_MEASURED
    return f"{' '.join(notes)} Medians; the methods take turns in shuffled order; random weights."


PARTS = {
    "merge": "**all parts** (3 R candidates)",
    "merge, none of these": "1.5 R candidates, no checkerboard, similarity alone, norms of means, "
    "full "
    "sizes",
}


def merging_cells() -> Table | None:
    """Agreement and KL with one part of merging at a time left out or replaced, on the seeds that
    all parts share."""
    measured = load("off_the_shelf")
    if measured is None:
        return None
    rows = [row for row in measured[1] if row["method"].startswith("merge")]
    methods = unique(rows, "method")
    shared = Counter((row["data"], row["rate"], row["seed"]) for row in rows)
    rows = [row for row in rows if shared[row["data"], row["rate"], row["seed"]] == len(methods)]
    cells = [(data, rate) for data in unique(rows, "data") for rate in unique(rows, "rate")]
    body: list[list[Cell]] = []
    for method in methods:
        line: list[Cell] = [PARTS.get(method, method.removeprefix("merge, "))]
        for data, rate in cells:
            cell = where(rows, data=data, rate=rate, method=method)
            line += [f"{mean(cell, 'agreement'):.1f}", f"{mean(cell, 'KL'):.3f}"]
        body.append(line)
    head = ["merging"]
    for data, rate in cells:
        head += [f"{data}, R = {rate}, agreement, %", f"{data}, R = {rate}, KL"]
    return Table(head, body)


def merging() -> str:
    measured, table = load("off_the_shelf"), merging_cells()
    if measured is None or table is None:
        return NOT_MEASURED
    shown = table.select(
        [name for name in table.head if "R = 8" not in name and "agreement" not in name]
    )
    note = (
        f"Mean of three seeds, {measured[0]['photos']} photos each. "
        f"{source('off_the_shelf', measured[0])}."
    )
    return f"{shown.markdown()}\n\n{note} With R = 8 and agreement: {link('merging_parts', table)}."


def calibration_target() -> Table | None:
    """KL with the largest later attention as the target of calibration, beside that with its
    mean."""
    measured = load("calibration_target")
    if measured is None:
        return None
    rows = measured[1]
    body: list[list[Cell]] = []
    for method in unique(rows, "method"):
        for data in unique(where(rows, method=method), "data"):
            for rate in sorted(unique(rows, "rate")):
                cell = where(rows, method=method, data=data, rate=rate)
                figures = [
                    f"{mean(where(cell, target=target), 'KL'):.3f}"
                    for target in ("mean", "largest")
                ]
                body.append([LABELS[method].strip("*"), data, str(rate), *figures])
    return Table(["method", "data", "R", "KL, mean", "KL, largest"], body)


def calibration_target_section() -> str:
    measured = load("calibration_target")
    if measured is None:
        return NOT_MEASURED
    return f"{link('calibration_target', calibration_target())}: {measured_on(measured[0])}."


def finetune() -> str:
    measured = load("finetune")
    if measured is None:
        return NOT_MEASURED
    env, rows = measured
    body: list[list[Cell]] = []
    for method in unique(rows, "method"):
        trainings = where(rows, method=method)
        figures = [spread(trainings, key, 1) for key in ("top-1 before", "top-1 after")]
        body.append([method, str(trainings[0]["rate"]), *figures])
    note = (
        f"Top-1 in % on {env['compare']} photos of Tiny-ImageNet, ViT-Ti/16 at 224 px, mean and "
        "range over "
        f"{len(unique(rows, 'seed'))} seeds; one epoch over {env['photos']} others, AdamW, "
        "learning rate "
        f"{env['learning_rate']}, batch {env['batch']}, calibrated queries fixed. "
        f"{measured_on(env)}."
    )
    return f"{Table(['pruned by', 'R', 'before', 'after'], body).markdown()}\n\n{note}"


def gpu_ops() -> str:
    measured = load("gpu_ops")
    if measured is None:
        return "GPU: not measured yet. `bash benchmarks/run_gpu.sh` runs the tests and measures."
    env, rows = measured
    columns = [name for name in rows[0] if " / " in name]
    body: list[list[Cell]] = []
    for row in rows:
        ratios = [f"{row[name]:.2f}" if name in row else "-" for name in columns]
        shape = "x".join(map(str, row["shape"]))
        body.append([row["model"], shape, row["dtype"], row["L2"], f"{row['prune, us']}", *ratios])
    table = Table(["model", "x", "dtype", "L2", "prune, us", *columns], body)
    return f"{table.markdown()}\n\n{measured_on(env)}."


def launch_cost() -> Table | None:
    measured = load("launch_cost")
    if measured is None:
        return None
    body: list[list[Cell]] = [
        [row["op"], f"{row['triton']:.1f}", f"{row['plan']:.1f}"] for row in measured[1]
    ]
    return Table(["op", "through Triton", "recorded"], body)


def launch_cost_section() -> str:
    """The range over all ops."""
    measured = load("launch_cost")
    if measured is None:
        return NOT_MEASURED
    env, rows = measured
    ranges = [
        f"{min(row[key] for row in rows):.1f} to {max(row[key] for row in rows):.1f}"
        for key in ("triton", "plan")
    ]
    return (
        f"Through Triton {ranges[0]}, recorded {ranges[1]} times as long: "
        f"{link('launch_cost', launch_cost())}. "
        f"{measured_on(env)}; the least of 50 rounds."
    )


SECTIONS: Sections = {
    "launch_cost": launch_cost_section,
    "cpu_ops": cpu_ops_section,
    "cpu_end_to_end": lambda: end_to_end_section("cpu"),
    "cuda_end_to_end": lambda: end_to_end_section("cuda"),
    "digits": digits,
    "merging": merging,
    "finetune": finetune,
    "calibration_target": calibration_target_section,
    "networks": networks_section,
    "gpu_ops": gpu_ops,
}
FILES: Files = {
    "launch_cost": launch_cost,
    "cpu_ops": cpu_ops,
    "cpu_end_to_end": lambda: end_to_end("cpu"),
    "cuda_end_to_end": lambda: end_to_end("cuda"),
    "cpu_networks": lambda: networks("cpu_networks"),
    "cpu_merging": lambda: networks("cpu_merging"),
    "merging_parts": merging_cells,
    "calibration_target": calibration_target,
}


def plot() -> None:
    """Time of each baseline over that of prune, per shape."""
    measured = load("cpu_ops")
    if measured is None:
        return
    plt = pyplot()
    env, rows = measured
    names = [name for name in rows[0] if name.endswith(" / prune")]
    labels = ["x".join(map(str, row["shape"])) + "\n" + row["dtype"] for row in rows]
    figure, axis = plt.subplots(figsize=(10, 3.6), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        offset = (i - (len(names) - 1) / 2) * width
        positions = [position + offset for position in range(len(rows))]
        axis.bar(positions, [row[name] for row in rows], width, label=name.removesuffix(" / prune"))
    axis.axhline(1.0, color="0.3", linewidth=0.8)
    axis.set_xticks(range(len(rows)), labels, fontsize=7)
    axis.set_ylabel("time over that of cropr::prune")
    axis.set_title(f"cropr::prune on {env['device']}, {env['threads']} thread", fontsize=10)
    axis.legend(fontsize=8)
    figure.savefig(DOCS / "cpu_ops.png", dpi=130)
    plt.close(figure)
