"""Queries of a pruned model, and files of them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .pruning.budget import Thresholds
from .pruning.fusion import Fusion, Restore
from .pruning.model import CroprModules, require_pruned
from .pruning.module import Cropr, FoldedCropr
from .pruning.options import options_of, write_to_config
from .schedule import SCHEDULES
from .utils.io import atomic_write, load_safetensors
from .utils.optional import import_optional

Model = TypeVar("Model", bound=nn.Module)
_METADATA = "about"  # key in the header of a file


def mark_calibrated(modules: CroprModules, restore: Restore) -> None:
    """Note that queries are calibrated, and choose the restoration if it is open: the network never
    saw old tokens."""
    modules.calibrated = True
    if modules.config.llf is not None:
        modules.config = replace(modules.config, llf=modules.config.llf.with_default(restore))


def set_queries(modules: CroprModules, queries: Tensor) -> None:
    """Set the folded queries, one row per module."""
    for module, query in zip(modules, queries):
        if isinstance(module, FoldedCropr):
            module.folded.copy_(query)
            continue
        module = cast(Cropr, module)
        if module.queries.shape[0] == 1:
            module.queries.copy_(query)
        else:
            # Several queries stay different, as their auxiliary predictions need it; their sum
            # scores.
            module.queries.add_(query / module.queries.shape[0] - module.queries.mean(0))


def save_queries(
    model: nn.Module, path: str | Path, metadata: Mapping[str, object] | None = None
) -> None:
    """Write the folded queries of a pruned model, (modules, D) float32, and its pruning options:
    safetensors.

    The commands prune with the schedule, merging and fusion in the file. `metadata` adds to these,
    or replaces them.

    Raises:
        TypeError: the model is not pruned.
        OSError: the file cannot be written.
        ImportError: safetensors is not installed.
    """
    modules = require_pruned(model, "cropr.save_queries")
    write = import_optional("safetensors.torch", "demo", "cropr.save_queries").save_file
    options = options_of(modules) or {}
    names = (*SCHEDULES, "llf", "merge", "thresholds")
    saved = {name: options[name] for name in names if name in options}
    text = json.dumps(saved | dict(metadata or {}), sort_keys=True)
    queries = torch.stack([modules.scorer(layer).query().cpu() for layer in range(len(modules))])
    with atomic_write(path) as temporary:
        write(
            {"queries": queries}, temporary, {_METADATA: text, "sha256": _checksum(queries, text)}
        )


def _checksum(queries: Tensor, metadata: str) -> str:
    return hashlib.sha256(queries.numpy().tobytes() + metadata.encode()).hexdigest()


def read_queries(path: str | Path) -> tuple[Tensor, dict[str, Any]]:
    """Read the queries (modules, D) in a file, and their metadata; errors are those of
    `load_queries`."""
    if Path(path).is_dir():
        raise ValueError(
            f"cropr.load_queries: {path} is a folder, not a file of cropr calibrate or "
            "cropr.save_queries"
        )
    try:
        tensors, header = load_safetensors(path)
        complete = "queries" in tensors and _METADATA in header
        reason = "" if complete else f"it has {', '.join([*tensors][:3]) or 'nothing'}"
    except ValueError:
        reason = "it is no safetensors file, or damaged"
    if reason:
        raise ValueError(
            f"cropr.load_queries: {path} holds no queries: {reason}; choose a file of cropr "
            "calibrate or "
            "cropr.save_queries"
        )
    queries = tensors["queries"]
    metadata = header[_METADATA]
    if header.get("sha256") != _checksum(queries, metadata):
        raise ValueError(
            f"cropr.load_queries: {path} is damaged: its checksum does not match; calibrate or "
            "copy again"
        )
    if queries.ndim != 2 or queries.dtype != torch.float32 or not queries.isfinite().all():
        raise ValueError(
            f"cropr.load_queries: queries must be finite, float32 and (modules, D), {path} holds "
            f"{queries.dtype} "
            f"{tuple(queries.shape)}"
        )
    return queries, json.loads(metadata)


@torch.no_grad()
def load_queries(model: Model, path: str | Path) -> Model:
    """Set the queries of a pruned model to those that `save_queries` or `cropr calibrate` wrote, in
    place.

    A model with Last Layer Fusion has one module fewer, and takes the first ones. The pruning
    options stay; if llf=True left it open, tokens are restored as in the file. Thresholds are taken
    if tokens merge as in the file.

    Returns:
        The same model.

    Raises:
        TypeError: the model is not pruned.
        FileNotFoundError: there is no such file.
        ValueError: it holds no queries, is damaged, or the queries are those of another model.
        ImportError: safetensors is not installed.
    """
    modules = require_pruned(model, "cropr.load_queries")
    queries, metadata = read_queries(path)
    dim = len(modules.scorer(0).query())
    if len(queries) < len(modules) or queries.shape[1] != dim:
        raise ValueError(
            f"cropr.load_queries: the model has {len(modules)} modules of width {dim}, {path} "
            "queries of shape "
            f"{tuple(queries.shape)}; calibrate this model"
        )
    set_queries(modules, queries.to(next(model.parameters()).device))
    saved_fusion = Fusion.from_saved(metadata.get("llf"))
    restore: Restore = (
        "track_parent" if saved_fusion is None else saved_fusion.restore or "as_pruned"
    )
    mark_calibrated(modules, restore)
    merge = modules.config.merge
    alike = merge is not None and metadata.get("merge") == asdict(merge)
    modules.thresholds = Thresholds.from_saved(metadata.get("thresholds")) if alike else None
    write_to_config(model)
    return model
