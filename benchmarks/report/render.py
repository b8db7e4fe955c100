"""From rows to Markdown: what all pages share."""

import re
import statistics
from collections.abc import Callable
from typing import Any

Sections = dict[str, Callable[[], str]]  # marker -> what stands between it and its end


def render(text: str, sections: Sections) -> str:
    """A page with every section between its markers replaced."""
    for name, make in sections.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"there is no section between <!-- {name} --> and <!-- end {name} -->")
        body = make()
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
    return text


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
