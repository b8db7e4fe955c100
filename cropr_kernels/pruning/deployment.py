"""deploy: copies of pruned models for inference."""

import copy
import math
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ..models.adapters import EngineRefusal, engine_parts
from ..models.packed_linear import is_plain_linear, pack
from .graphs import CAPACITY, PATCHES, PATIENCE, GraphedForward, Graphs
from .model import CroprModules, modules_of, require_pruned, warn_of_random_queries
from .module import Cropr, FoldedCropr
from .options import write_to_config

Model = TypeVar("Model", bound=nn.Module)


def deploy(model: Model, *, engine: bool = True, cuda_graphs: int | None = None) -> Model:
    """Return a copy for inference: eval, frozen, auxiliary parts gone, M queries folded into one
    per layer.

    The argument stays as it was. A rate of 0 is the unpruned model on the same engine. Warns, once
    a model, if the queries were neither trained, calibrated nor loaded.

    Of a calibrated model that merges at a rate, each image keeps as many tokens as it needs, and
    the rate is a mean over photos (`pruning.budget`). Counts are equal with lists of counts
    (`keep`), masks, images of another size, CUDA graphs and torch.compile.

    Args:
        model: pruned by `apply`.
        engine: run the blocks on the zero-copy engine (`pruning.engine`) if it knows them; at equal
            counts its logits are those of model.eval() up to rounding. Other blocks use the
            functional ops; the repr of `model.cropr` has the reason. False: functional ops, logits
            of model.eval() bit for bit, as for inputs that require a gradient.
        cuda_graphs: the number of CUDA graphs of forward at a time; 0 for none. One is captured at
            the first call for each shape, schedule and precision; together they hold the memory of
            one forward. Default: 8 where counts are equal, of batches of up to 4096 patches, above
            which launches do not count. There are none for CPU inputs and inputs that require a
            gradient, in training mode, under torch.compile, in transforms and other graphs, and if
            modules have hooks or outputs of several blocks are asked for.

    Raises:
        TypeError: the model is not pruned.
        ValueError: cuda_graphs is negative.
    """
    modules = require_pruned(model, "cropr.deploy")
    warn_of_random_queries(model, "cropr.deploy")
    deployed = deployed_copy(model, engine=engine, cuda_graphs=cuda_graphs)
    modules_of(deployed).warned = modules.warned
    return deployed


def deployed_copy(
    model: Model,
    *,
    engine: bool = True,
    cuda_graphs: int | None = 0,
    equal_counts: bool = False,
) -> Model:
    """`deploy` without the warning of random queries, for measurements of time, which does not
    depend on them; with equal_counts every image keeps equally many tokens."""
    if cuda_graphs is not None and cuda_graphs < 0:
        raise ValueError(f"cropr.deploy: cuda_graphs must be >= 0, got {cuda_graphs}")
    folded = {
        id(module): FoldedCropr(module) for module in modules_of(model) if isinstance(module, Cropr)
    }
    with torch.inference_mode(False):  # of whose tensors nobody counts the changes
        deployed = copy.deepcopy(model, cast(dict[int, Any], folded))
    modules = modules_of(deployed)
    write_to_config(deployed)
    _set_engine(modules, engine)
    if equal_counts:
        modules.thresholds = None
    if cuda_graphs is None and modules.has_counts_by_image:
        cuda_graphs = 0
    modules.graphs = None
    modules.warned = True
    if GraphedForward.of(deployed) is not None:
        del deployed.forward
    if cuda_graphs != 0 and "forward" not in vars(deployed):  # the forward of a third party stays
        modules.graphs = Graphs(CAPACITY, PATIENCE) if cuda_graphs is None else Graphs(cuda_graphs)
        max_patches = PATCHES if cuda_graphs is None else math.inf
        deployed.forward = GraphedForward(deployed, max_patches).forward  # type: ignore[method-assign]
    return deployed.eval().requires_grad_(False)


def _set_engine(modules: CroprModules, engine: bool) -> None:
    """Look up the blocks for the engine, or note the reason why it does not run them."""
    modules.engine = None
    modules.watched = []
    modules.linear_layers = []
    modules.engine_reason = ""
    try:
        if modules.config.windows is not None:
            raise EngineRefusal("window attention")
        if not engine:
            raise EngineRefusal("switched off by deploy(engine=False)")
        if not modules.selects_by_query:
            raise EngineRefusal(f"{type(modules[0]).__name__} does not select by its query alone")
        modules.engine = engine_parts(modules.spec)
    except EngineRefusal as refusal:
        modules.engine_reason = str(refusal)
    for parts in modules.engine or ():
        modules.watched += parts.watched()
        modules.linear_layers += filter(is_plain_linear, parts.block.modules())
    pack(modules.linear_layers)


def hold_graphs(deployed: nn.Module, count: int) -> None:
    """Raise the number of CUDA graphs that a deployed model may have, as for schedules that are
    timed in turns."""
    graphs = modules_of(deployed).graphs
    if graphs is not None:
        graphs.capacity = max(graphs.capacity, count)
