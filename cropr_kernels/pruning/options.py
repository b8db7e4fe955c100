"""The options of a pruned model as plain values, which files hold."""

from dataclasses import asdict
from typing import Any

from torch import nn

from ..schedule import SCHEDULES
from .model import CroprModules, modules_of
from .module import Cropr, FoldedCropr


def options_of(modules: CroprModules) -> dict[str, Any] | None:
    """Return the options with which `apply` makes such modules, as plain values; None for modules
    of another class."""
    first = modules[0]
    if not isinstance(first, Cropr | FoldedCropr) or type(first) not in (Cropr, FoldedCropr):
        return None
    config = modules.config
    head = first.aggregator if isinstance(first, Cropr) else None
    if head is not None and (head.mlp is None or head.mlp[0].out_features != 4 * modules.spec.dim):
        return None
    schedule = {name: getattr(config.schedule, name) for name in SCHEDULES}
    thresholds = {} if modules.thresholds is None else {"thresholds": asdict(modules.thresholds)}
    return {
        **{name: value for name, value in schedule.items() if value is not None},
        **thresholds,
        "llf": asdict(config.llf) if config.llf else False,
        "merge": config.merge and asdict(config.merge),
        "windows": config.windows and asdict(config.windows),
        "img_size": list(modules.spec.img_size_of(config.grid)),
        "num_queries": len(first.queries) if isinstance(first, Cropr) else 1,
        "num_outputs": head.head.out_features if head is not None else 0,
    }


def write_to_config(model: nn.Module) -> None:
    """Add the options to the configuration of a Hugging Face model, which save_pretrained
    writes."""
    options = options_of(modules_of(model))
    config: Any = getattr(model, "config", None)
    if options is not None and hasattr(config, "save_pretrained"):
        config.cropr = options
