"""Tables as Markdown and as CSV, and pages with generated sections: what all reports share."""

import csv
import io
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.utils import results

NOT_MEASURED = "Not measured yet."
# Labels in results that were measured before a name changed.
RENAMED = (
    (r'"left"|^left$', "as_pruned"),
    (r'"host"', "track_parent"),
    (r", host$", ", track_parent"),
    (r"\bhost_offsets", "parent_offsets"),
    (r"\badd_hosts\b", "add_parents"),
    (r"\bhost(?=s?\b)", "parent"),
    (r"\bbehind\b", "after"),
    (r"\bchosen anew\b", "updated"),
    (r"\bwhole\b", "full"),
    (r"\bchoice of the redundant\b", "choice by redundancy"),
)


@dataclass(frozen=True)
class Spread:
    """Mean of several measurements, with their range where they differ."""

    values: list[float]
    digits: int

    def __str__(self) -> str:
        mean, low, high = self.columns()
        return mean if min(self.values) == max(self.values) else f"{mean} ({low} to {high})"

    def columns(self) -> list[str]:
        """Mean, minimum and maximum."""
        figures = (statistics.mean(self.values), min(self.values), max(self.values))
        return [re.sub(r"^-(0(\.0*)?)$", r"\1", f"{value:.{self.digits}f}") for value in figures]


Cell = str | Spread


@dataclass(frozen=True)
class Table:
    """Column names and rows of cells."""

    head: list[str]
    rows: list[list[Cell]]

    def markdown(self) -> str:
        lines: list[list[Cell]] = [[*self.head], *self.rows]
        text = ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
        return "\n".join([text[0], "|" + "---|" * len(self.head), *text[1:]])

    def means(self) -> "Table":
        """The table without ranges."""
        return Table(
            self.head,
            [
                [cell.columns()[0] if isinstance(cell, Spread) else cell for cell in row]
                for row in self.rows
            ],
        )

    def select(self, columns: Sequence[str]) -> "Table":
        """Some of the columns."""
        indices = [self.head.index(name) for name in columns]
        return Table(list(columns), [[row[i] for i in indices] for row in self.rows])

    def csv(self) -> str:
        """Plain numbers; a column with ranges becomes three: mean, minimum and maximum."""
        ranged = [
            any(isinstance(row[i], Spread) for row in self.rows) for i in range(len(self.head))
        ]
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        head: list[str] = []
        for name, is_ranged in zip(self.head, ranged):
            head += [name, f"{name}, min", f"{name}, max"] if is_ranged else [name]
        writer.writerow(head)
        for row in self.rows:
            line: list[str] = []
            for cell, is_ranged in zip(row, ranged):
                if isinstance(cell, Spread):
                    line += cell.columns()
                else:
                    line += [plain(cell), *([""] * 2 if is_ranged else [])]
            writer.writerow(line)
        return file.getvalue()


Sections = dict[str, Callable[[], str]]  # marker -> what stands between it and its end
# Name of a CSV file -> its table, None if nothing is measured
Files = dict[str, Callable[[], Table | None]]
Result = tuple[dict[str, Any], list[dict[str, Any]]]


def plain(cell: str) -> str:
    """A cell without Markdown and units."""
    text = cell.replace("**", "").replace("`", "")
    number = re.fullmatch(r"(-?\d+(?:\.\d+)?)(?:x| %)", text)
    return "" if text == "-" else number[1] if number else text


def load(name: str) -> Result | None:
    """Environment and rows of benchmarks/results/<name>.json, with today's names; None if there is
    no such file."""
    stored = results.load(name)
    if stored is None:
        return None
    environment, rows = stored
    return renamed(environment), [renamed(row) for row in rows]


def renamed(row: dict[str, Any]) -> dict[str, Any]:
    return {key: rename(value) if isinstance(value, str) else value for key, value in row.items()}


def rename(label: str) -> str:
    for pattern, name in RENAMED:
        label = re.sub(pattern, name, label)
    return label


def render(text: str, sections: Sections) -> str:
    """A page with every section between its markers replaced."""
    for name, write in sections.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"there is no section between <!-- {name} --> and <!-- end {name} -->")
        body = write().replace("\\", r"\\")
        text = pattern.sub(rf"\g<1>{body}\n\g<2>", text)
    return text


def measured_on(env: dict[str, Any]) -> str:
    """Device, threads, torch, commit and date."""
    threads = (
        f", {env['threads']} thread{'s' if env['threads'] != 1 else ''}"
        if env.get("threads")
        else ""
    )
    return f"{env['device']}{threads}, torch {env['torch']}, commit {env['commit']}, {env['date']}"


def source(name: str, env: dict[str, Any]) -> str:
    """`measured_on`, or a link to the results if they are of several devices or commits."""
    if any("(" in str(env[key]) for key in ("device", "torch", "commit")):
        return f"Environment in [{name}.json](../benchmarks/results/{name}.json)"
    return measured_on(env)


def link(name: str, table: Table | None) -> str:
    """A link from a page of docs/ to a CSV file, with its size."""
    rows = 0 if table is None else len(table.rows)
    return f"[{name}.csv](../benchmarks/results/{name}.csv) ({rows} rows)"


def unique(rows: list[dict[str, Any]], key: str) -> list[Any]:
    """Values of a column, in order of appearance."""
    return list(dict.fromkeys(row[key] for row in rows))


def where(rows: list[dict[str, Any]], **values: Any) -> list[dict[str, Any]]:
    """The rows that hold these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in values.items())]


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def spread(rows: list[dict[str, Any]], key: str, digits: int) -> Spread:
    return Spread([row[key] for row in rows], digits)
