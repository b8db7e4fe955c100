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

Written by `python docs/make_api.py` from the docstrings, without the errors they list
(`help(cropr.apply)` shows them). `import cropr_kernels as cropr` imports the first section. Each
function of `cropr.ops` calls the op of its name, `torch.ops.cropr.*`; names that end in an
underscore work in place, on the engine's residual buffer. Unless said otherwise `model` is pruned
by `apply`, `images` are (B, C, H, W), and `kwargs` are passed to the model.
"""
COMMON = (  # lines that the head says once
    "    model: pruned by `apply`.",
    "    images: (B, C, H, W).",
    "    kwargs: what else the model is called with.",
)
MODULES = (
    "torch.nn.modules.module.",
    "torch._tensor.",
    "torch.",
    "collections.abc.",
    "typing.",
    "pathlib.",
)


def signature(name: str, member: Any) -> str:
    """name(arguments) -> result as in the source, without module names, `-> None`, and argument
    types of ops."""
    try:
        arguments = inspect.signature(member)
    except (TypeError, ValueError):
        return name
    # The docstrings give shapes and dtypes
    if name.startswith("cropr.ops.") and inspect.isfunction(member):
        untyped = [
            parameter.replace(annotation=parameter.empty)
            for parameter in arguments.parameters.values()
        ]
        arguments = arguments.replace(parameters=untyped)
    text = f"{name}{arguments}"
    for module in MODULES:
        text = text.replace(module, "")
    text = text.replace("~", "")  # of type variables
    return re.sub(r"cropr_kernels(\.\w+)*\.(?=[A-Z])", "", text).removesuffix(" -> None")


def documentation(name: str, member: Any) -> str:
    """The docstring without its section of errors; of an op only the first paragraph."""
    text = inspect.cleandoc(member.__doc__ or "")
    if name.startswith("cropr.ops."):
        return text.split("\n\n")[0]
    text = "\n".join(line for line in text.splitlines() if line not in COMMON)
    text = re.sub(r"\n\nRaises:\n(?:    .*(?:\n|$))+", "", text).strip()
    text = text.removesuffix("\n\nReturns:\n    The same model.")
    return re.sub(r"\n\nArgs:(?=\n\n|$)", "", text)  # of which no line is left


def entry(name: str, member: Any) -> str:
    """One function or class: heading, signature, docstring."""
    return f"### {name}\n\n```\n{signature(name, member)}\n\n{documentation(name, member)}\n```\n"


def public(module: Any, names: list[str] | None = None) -> list[tuple[str, Any]]:
    """Functions and classes that a module itself defines, or those of the names."""
    if names is not None:
        members = [(name, getattr(module, name)) for name in names]
    else:
        members = [
            (name, member) for name, member in vars(module).items() if not name.startswith("_")
        ]
        members = [
            (name, member)
            for name, member in members
            if getattr(member, "__module__", "") == module.__name__
        ]
    return [
        (name, member)
        for name, member in members
        if inspect.isfunction(member) or inspect.isclass(member)
    ]


def page() -> str:
    """The full reference."""
    names = [
        name
        for name, member in vars(cropr_kernels).items()
        if not name.startswith("_") and not inspect.ismodule(member)
    ]
    sections = {
        "cropr": ("cropr.", public(cropr_kernels, sorted(names, key=str.lower))),
        "cropr_kernels.tasks": ("", public(tasks, ["Classifier", "Segmenter", "Detector"])),
        "cropr.ops": ("cropr.ops.", public(functional)),
    }
    text = HEAD
    described: set[int] = set()
    for title, (prefix, members) in sections.items():
        entries = [
            entry(f"{prefix}{name}", member)
            for name, member in members
            if id(member) not in described
        ]
        described |= {id(member) for _, member in members}
        text += f"\n## {title}\n\n" + "\n".join(entries)
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
