"""The section and CSV file of docs/supported-models.md: every Vision Transformer that was tried."""

import re

from benchmarks.report.render import (
    NOT_MEASURED,
    Cell,
    Files,
    Sections,
    Table,
    link,
    load,
    unique,
    where,
)

NOT_TRIED = "not tried"
# Reasons against a model, in the order in which they are looked for, as the page says them.
_REASONS = {
    "packed": "images are packed or cut into tiles",
    "tiles": "images are packed or cut into tiles",
    "outputs": "images are packed or cut into tiles",
    "maps (B, H, W, D)": "windows, stages or maps (B, H, W, D) between blocks",
    "run apart": "windows, stages or maps (B, H, W, D) between blocks",
    "no two blocks": "windows, stages or maps (B, H, W, D) between blocks",
    "reads positions": "blocks read positions from the order of tokens",
    "stand between": "other tokens stand between the patches",
    "take a part": "blocks take all tokens only",
    "with text": "patches stand beside text",
    "fails": "a forward takes other inputs than images of one size",
}


def table() -> Table | None:
    """Every model, what works, and why others do not."""
    measured = load("supported_models")
    if measured is None:
        return None
    head = ["library", "model", "pruned", "engine", "merging", "calibration", "masking", "reason"]
    rows: list[list[Cell]] = []
    for row in measured[1]:
        pruned = "yes" if row["supported"] else "no"
        masking = row.get("masking", "")
        cells = (row["engine"], row["merges"], row["calibrates"], masking, row["reason"])
        rows.append([row["library"], row["name"], pruned, *map(_short, cells)])
    return Table(head, rows)


def _short(text: str) -> str:
    """A reason without the names of classes in front of it."""
    return re.sub(rf"^(\S+ cannot be pruned: (\w+: )?|{NOT_TRIED}: )", "", text)[:160]


def supported_models() -> str:
    """Counts by library, and the reasons against the others."""
    measured, full = load("supported_models"), table()
    if measured is None or full is None:
        return NOT_MEASURED
    env, rows = measured
    body: list[list[Cell]] = []
    for library in unique(rows, "library"):
        names = where(rows, library=library)
        tried = [row for row in names if not row["reason"].startswith(NOT_TRIED)]
        pruned = where(tried, supported=True)
        counts = [
            len(where(pruned, **{column: "yes"})) for column in ("engine", "merges", "calibrates")
        ]
        body.append([library, *map(str, (len(names), len(tried), len(pruned), *counts))])
    head = ["library", "names", "tried", "pruned", "on the engine", "merging", "calibration"]
    counts = Table(head, body)
    refused = [row for row in rows if not row["supported"]]
    reasons: dict[str, list[str]] = {}
    for row in refused:
        found = (reason for part, reason in _REASONS.items() if part in row["reason"])
        reasons.setdefault(next(found, "other"), []).append(row["name"])
    lines = [
        f"- {reason} ({len(names)}): {', '.join(_families(names))}"
        for reason, names in reasons.items()
    ]
    note = (
        f"Small random models: {link('supported_models', full)}. "
        "Pruned: rate 0 equals the "
        "unpruned model bit for bit, and a deployed model the functional ops; masking: dropping "
        "equals hiding keys. timm "
        f"{env['timm']}, transformers "
        f"{env['transformers']}, torch {env['torch']}. Not supported:"
    )
    return "\n".join([counts.markdown(), "", note, "", *lines])


def _families(names: list[str]) -> list[str]:
    """The first words of names, each once."""
    return list(dict.fromkeys(re.split(r"[_\d]", name)[0] or name for name in names))


SECTIONS: Sections = {"supported_models": supported_models}
FILES: Files = {"supported_models": table}
