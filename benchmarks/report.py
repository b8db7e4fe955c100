"""Write the README's tables and plot from the JSON under benchmarks/results/. Run it after a benchmark.

python benchmarks/report.py [--check]      --check: fail if the README is not what the results say
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from common import RESULTS

README = Path(__file__).parent.parent / "README.md"
PLOT = README.parent / "docs" / "cpu_ops.png"


def load(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return None
    data = json.loads(path.read_text())
    return data["environment"], data["rows"]


def where(env: dict[str, Any]) -> str:
    threads = f", {env['threads']} thread{'s' if env['threads'] != 1 else ''}" if env.get("threads") else ""
    return f"{env['device']}{threads}, torch {env['torch']}, commit {env['commit']}, {env['date']}"


def grid(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
        + f"\n\n{where(env)}; medians; the rivals take turns of 2 ms in shuffled order."
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


def networks(device: str) -> str:
    found = load(f"{device}_networks")
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


def calibration() -> str:
    found = load("calibration")
    if found is None:
        return "Not measured yet."
    env, rows = found
    body = []
    for rate in dict.fromkeys(row["rate"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["rate"] == rate and row["method"] == method]
            agreement, divergence = ([row[key] for row in own] for key in ("agreement", "KL"))
            body.append(
                [
                    str(rate),
                    method,
                    f"{statistics.mean(agreement):.1f} % ({min(agreement):.1f} to {max(agreement):.1f})",
                    f"{statistics.mean(divergence):.3f} ({min(divergence):.3f} to {max(divergence):.3f})",
                ]
            )
    seeds = len({row["seed"] for row in rows})
    note = (
        f"{seeds} seeds, each with {env['photos']} Tiny-ImageNet photos to calibrate on, as many others to compare on"
    )
    head = ["rate", "scorer", "agreement with the unpruned model", "KL"]
    return grid(head, body) + f"\n\nViT-Ti/16 at 224 px; {note}; mean, and range over seeds. {where(env)}."


def gpu_ops() -> str:
    found = load("gpu_ops")
    if found is None:
        return "GPU: not measured yet. `bash benchmarks/on_gpu.sh` runs the tests and measures."
    env, rows = found
    columns = [name for name in rows[0] if " / " in name]
    body = [
        [row["model"], "x".join(map(str, row["shape"])), row["dtype"], row["L2"], f"{row['prune, us']}"]
        + [f"{row[name]:.2f}" if name in row else "-" for name in columns]
        for row in rows
    ]
    return grid(["", "x", "dtype", "L2", "prune, us", *columns], body) + f"\n\n{where(env)}."


SECTIONS = {
    "cpu_ops": cpu_ops,
    "cpu_end_to_end": lambda: end_to_end("cpu"),
    "cuda_end_to_end": lambda: end_to_end("cuda"),
    "digits": digits,
    "calibration": calibration,
    "cpu_networks": lambda: networks("cpu"),
    "gpu_ops": gpu_ops,
}


def render(text: str) -> str:
    """The README with every section between its markers replaced."""
    for name, make in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md has no section between <!-- {name} --> and <!-- end {name} -->")
        body = make()
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
    return text


def plot() -> None:
    """How much faster than each rival, per shape."""
    found = load("cpu_ops")
    if found is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = README.read_text()
    fresh = render(text)
    if options.check:
        sys.exit(0 if fresh == text else "README.md differs from the results: run python benchmarks/report.py")
    README.write_text(fresh)
    plot()


if __name__ == "__main__":
    main()
