"""Pictures: matplotlib without a display, and the curve of time against tokens."""

from pathlib import Path
from typing import Any


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_latency_curve(path: Path, rows: list[dict[str, Any]], env: dict[str, Any]) -> None:
    """Of rows with tokens and their time relative to that of the longest sequence."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    axis.step([row["tokens"] for row in rows], [row["relative"] for row in rows], where="mid")
    axis.set_xlabel("tokens")
    axis.set_ylabel("time of a block (longest = 1)")
    axis.set_title(f"{env['model']}, batch {env['batch']}, {env['dtype']}, {env['device']}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
