"""From the JSON under benchmarks/results/ to Markdown: what all pages share."""

import json
import statistics
from typing import Any

from common import RESULTS


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


def spread(values: list[float], digits: int, unit: str = "") -> str:
    """Mean, and the range over seeds where they differ."""
    if min(values) == max(values):
        return f"{values[0]:.{digits}f}{unit}"
    mean, low, high = (f"{value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean}{unit} ({low} to {high})"
