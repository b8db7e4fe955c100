"""Write docs/api.md, the API reference, from signatures and docstrings.

python docs/make_api.py
"""

import inspect
import re
from pathlib import Path
from typing import Any

import cropr_kernels
from cropr_kernels import tasks
from cropr_kernels.ops import functional

PAGE = Path(__file__).parent / "api.md"
HEAD = """# API reference

Written by `python docs/make_api.py` from the docstrings. `import cropr_kernels as cropr` gives everything of the first
section; each function of `cropr.ops` calls the op of its name, `torch.ops.cropr.*`.
"""


def signature(name: str, thing: Any) -> str:
    """name(arguments) -> result, as it stands in the source, without the package's own module names."""
    try:
        text = f"{name}{inspect.signature(thing)}"
    except (TypeError, ValueError):
        return name
    for module in ("torch.nn.modules.module.", "torch._tensor.", "torch.", "collections.abc.", "typing.", "pathlib."):
        text = text.replace(module, "")
    text = text.replace("~", "")  # of type variables
    return re.sub(r"cropr_kernels(\.\w+)*\.(?=[A-Z])", "", text)


def entry(name: str, thing: Any, level: str = "###") -> str:
    """One function or class: heading, signature, docstring."""
    doc = inspect.cleandoc(thing.__doc__ or "")
    return f"{level} {name}\n\n```\n{signature(name, thing)}\n\n{doc}\n```\n"


def public(module: Any, names: list[str] | None = None) -> list[tuple[str, Any]]:
    """Functions and classes that a module itself defines, or those of the names."""
    found = names or [name for name in vars(module) if not name.startswith("_")]
    things = [(name, getattr(module, name)) for name in found]
    own = [(name, thing) for name, thing in things if inspect.isfunction(thing) or inspect.isclass(thing)]
    return [(name, thing) for name, thing in own if names or thing.__module__ == module.__name__]


def page() -> str:
    """The whole reference."""
    names = [name for name in vars(cropr_kernels) if not name.startswith("_")]
    front = public(
        cropr_kernels, sorted((n for n in names if not inspect.ismodule(getattr(cropr_kernels, n))), key=str.lower)
    )
    sections = [
        ("cropr", [entry(f"cropr.{name}", thing) for name, thing in front]),
        (
            "cropr_kernels.tasks",
            [entry(name, thing) for name, thing in public(tasks, ["Classifier", "Segmenter", "Detector"])],
        ),
        ("cropr.ops", [entry(f"cropr.ops.{name}", thing) for name, thing in public(functional)]),
    ]
    return HEAD + "".join(f"\n## {title}\n\n" + "\n".join(entries) for title, entries in sections)


if __name__ == "__main__":
    PAGE.write_text(page())
