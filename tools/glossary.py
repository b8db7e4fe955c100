"""Report identifiers that the glossary replaces: `python tools/glossary.py FILE_OR_FOLDER ...`.

RENAMED words are reported wherever code uses them; VAGUE words only where code binds them, so that
attributes and keyword arguments of other libraries pass. Whole identifiers count, in any case and
without outer underscores: `on_host` is not `host`. Strings, comments and prose are not read; of
Markdown only code is, and only for RENAMED words.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

RENAMED = {
    "parent_offsets": "host_offsets",
    "add_parents": "add_hosts",
    "parent_idx": "host_idx",
    "tracks_parents": "by_host",
    "target_idx": "safe_idx",
    "full_blocks": "whole_blocks",
    "traced_context": "traced_slot",
    "normalize": "normalise normalised",
    "keep_launches": "keep_plan",
    "mean_over_queries": "of_image",
    "time_interleaved": "in_turns",
}
VAGUE = {
    "parent, or cpu_... beside a GPU": "host hosts",
    "target": "safe",
    "full": "whole wholes",
    "after": "behind",
    "forward context, or row_idx": "slot slots",
    "cost_scale or latencies": "costs",
    "device, rank, pool, path or reference": "place places",
    "recorded launches, assignment or budget": "plan plans",
    "metadata, config or options": "about how",
    "the noun it holds": "found given gone kind kinds made one own said those told wanted what",
}
CPP_NAMES = {"costs", "kind", "kinds"}  # legitimate in csrc: costs of pairs, kinds of an enum
# A member is reported where it is declared
IDENTIFIER = re.compile(r"(?<![\w.])(?<!->)(?<!::)[A-Za-z_]\w*")
CPP_TEXT = re.compile(r'(//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*")', re.DOTALL)
MARKDOWN_CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)


def by_word(table: dict[str, str]) -> dict[str, str]:
    return {word: use for use, words in table.items() for word in words.split()}


def python_identifiers(text: str) -> Iterator[tuple[int, str, bool]]:
    """Yield the line and the name of every identifier, and whether it is bound there."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Name(id=name, ctx=context) | ast.Attribute(attr=name, ctx=context):
                yield node.lineno, name, isinstance(context, ast.Store)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                yield node.lineno, name, True
            case (
                ast.alias(asname=str(name))
                | ast.ExceptHandler(name=str(name))
                | ast.MatchAs(name=str(name))
            ):
                yield node.lineno, name, True
            case ast.alias(name=name) | ast.keyword(arg=str(name)):
                yield node.lineno, name.rpartition(".")[2], False


def identifiers(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Yield the same for any file; C++ names count as bound, names in Markdown do not."""
    text = path.read_text(encoding="utf-8")
    markdown = path.suffix == ".md"
    if path.suffix == ".py":
        yield from python_identifiers(text)
        return
    line = 1
    for i, part in enumerate((MARKDOWN_CODE if markdown else CPP_TEXT).split(text)):
        # Odd parts are what the pattern matched
        for match in IDENTIFIER.finditer(part) if i % 2 == markdown else ():
            if match[0].lower() not in CPP_NAMES:
                yield line + part.count("\n", 0, match.start()), match[0], not markdown
        line += part.count("\n")


def problems(path: Path) -> list[str]:
    """Return a line for each word that is replaced: where it is, and what to use."""
    renamed = by_word(RENAMED)
    vague = by_word(VAGUE)
    lines = []
    for line, name, bound in sorted(set(identifiers(path))):
        word = name.strip("_").lower()
        use = renamed.get(word) or (vague.get(word) if bound else None)
        if use is not None:
            lines.append(f"{path}:{line}: {name}: use {use}")
    return lines


def main(arguments: list[str]) -> int:
    folders = [file for argument in arguments for file in Path(argument).rglob("*")]
    files = [*filter(Path.is_file, map(Path, arguments)), *sorted(folders)]
    lines = [
        line
        for file in files
        if file.suffix in (".py", ".cpp", ".h", ".md")
        for line in problems(file)
    ]
    print(*lines, f"glossary: {len(lines)} problems", sep="\n")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
