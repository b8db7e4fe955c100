"""A pruned model: `model.cropr`, and what happens before and after its own forward."""

import inspect
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from ..models.adapters import BlockParts, ModelSpec, is_hooked
from ..models.pixels import Pixels
from ..schedule import num_modules
from .config import PruningConfig
from .graphs import Graphs
from .masks import level_padding
from .module import Scorer
from .state import PruningOptions, PruningState, Slot, Slots

T = TypeVar("T")


class CroprModules(nn.ModuleList):
    """`model.cropr`: the Cropr modules in order, how they prune, and what they know of the model."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        config: PruningConfig,
        spec: ModelSpec,
        later: int = 0,
    ):
        super().__init__(modules)
        self.config, self.spec = config, spec
        self.later = later  # outputs of the auxiliary heads that training will need; 0: none, or they are there
        if later:
            self.requires_grad_(True)
        self.slots, self.traced_slot = Slots(), Slot()
        self.recompute = False  # run blocks again in backward instead of keeping their activations
        # What remove undoes: hooks, and attributes of the model that apply changed.
        self.hooks: list[RemovableHandle] = []
        self.replaced: list[tuple[Any, str, Any]] = []
        # Set by deploy: the blocks as the engine runs them, or why the functional ops run them; graphs, if any.
        self.engine: list[BlockParts] | None = None
        self.watched: list[tuple[nn.Module, str, nn.Module]] = []
        self.engine_reason = "for inference: cropr.deploy"
        self.graphs: Graphs | None = None
        self.warned = False  # of random queries
        self.calibrated = False  # in closed form, or loaded from a file of such queries
        self.pixels: Pixels | None = None  # how the model's images are prepared, where `load` knows it

    def train(self, mode: bool = True) -> "CroprModules":
        if mode:
            self._make_heads()
        return super().train(mode)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Of a model that was trained: the heads are among what is loaded.

        Modules that fusion over more blocks leaves without work are left out.
        """
        for name in [name for name in state_dict if name.startswith(prefix)]:
            module = name[len(prefix) :].partition(".")[0]
            if self.config.llf is not None and module.isdecimal() and int(module) >= len(self):
                del state_dict[name]
        if any(name.startswith(prefix) and ".aggregator." in name for name in state_dict):
            self._make_heads()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _make_heads(self) -> None:
        if self.later:
            outputs, self.later = self.later, 0
            modules: list[Any] = [*self]
            for module in modules:
                module.add_head(outputs)
            _watch_optimizers(self)

    @property
    def num_used(self) -> int:
        """How many modules prune: fusion over more blocks, set later, leaves some without work."""
        return num_modules(len(self.spec.blocks), self.config.whole_blocks)

    @property
    def slot(self) -> Slot:
        """The forward that this thread runs. torch.compile cannot trace what is a thread's own: it has one for all."""
        traced = self.traced_slot
        under_way = traced.options is not None or traced.state is not None
        return traced if under_way or torch.compiler.is_compiling() else self.slots.own

    def engine_is_clear(self) -> bool:
        """Whether the blocks still are what deploy saw: no hooks on them, no other layers in their place."""
        return not any(
            owner._modules.get(name) is not module or is_hooked(module) for owner, name, module in self.watched
        ) and not any(is_hooked(parts.block) for parts in self.engine or ())

    def __repr__(self) -> str:
        engine = f"off ({self.engine_reason})" if self.engine is None else "on"
        return super().__repr__().replace("(", f"({self.config}, engine {engine}", 1)


def _watch_optimizers(stack: Any) -> None:
    """Refuse the first step of an optimizer that was made before these heads."""
    first, checked = weakref.ref(stack[0]), False

    def check(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal checked
        module: Any = first()
        if checked or module is None:
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        checked = id(module.queries) in held
        if checked and not any(id(parameter) in held for parameter in module.aggregator.parameters()):
            checked = False
            raise RuntimeError(
                "cropr: the optimizer was made before model.train() made the auxiliary heads, and does not train them; "
                "make it after model.train(), or give num_outputs to cropr.apply"
            )

    weakref.finalize(stack, register_optimizer_step_pre_hook(check).remove)


def is_pruned(model: Any) -> bool:
    """Whether `apply` has pruned the model."""
    return isinstance(getattr(model, "cropr", None), CroprModules)


def require_pruned(model: Any, caller: str) -> CroprModules:
    """The modules of a pruned model; of another TypeError, which names the caller."""
    if not is_pruned(model):
        raise TypeError(f"{caller}: the model is not pruned; call cropr.apply(model, rate=...) first")
    return model.cropr


def warn_of_random_queries(model: Any, caller: str, stacklevel: int = 3) -> None:
    """Say once of a pruned model that what it prunes is arbitrary, where it is; a decorator is one more level."""
    stack: CroprModules = model.cropr
    if (
        stack.warned
        or stack.config.schedule.rate == 0
        or not any(isinstance(one, Scorer) and one.is_random() for one in stack)
    ):
        return
    stack.warned = True
    warnings.warn(
        f"{caller}: the queries are random, so what is pruned is arbitrary; call cropr.calibrate(model, images), "
        "cropr.load_queries(model, file), or train first",
        stacklevel=stacklevel,
    )


def run(model: Any, call: Callable[[], T], options: PruningOptions) -> tuple[T, PruningState]:
    """call(), which runs the model, and what became of its tokens; ValueError where a mask does not fit it."""
    stack = model.cropr
    slot = stack.slot
    _check_masks(model, options)
    slot.options, slot.state, slot.stack = options._replace(predict=bool(options.predict)), None, stack
    try:
        output = call()
        return output, slot.state
    finally:
        slot.clear()


def features(
    model: Any, images: Tensor, *, protect: Tensor | None = None, padding: Tensor | None = None, predict: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Tokens after the last norm, (B, K, D), and auxiliary predictions, of a timm model or `cropr_kernels.ViT`.

    Args:
        model: pruned by `apply`.
        images: (B, C, H, W).
        protect, padding: (B, grid height, grid width) bool, as `apply` describes them. What tokens of padding hold
            means nothing.
        predict: whether to compute the auxiliary predictions; there are none otherwise.

    Returns:
        The tokens kept; all in their original order with Last Layer Fusion or where tokens merged (each copied to all
        positions that it stands for); with windows the patches alone.

    Raises:
        TypeError: the model is not pruned.
        ValueError: a mask does not fit.
    """
    require_pruned(model, "cropr.features")
    options = PruningOptions(protect=protect, padding=padding, predict=predict, engine=True)
    tokens, state = run(model, lambda: model.forward_features(images), options)
    return tokens, state.aux


# Hooks on the model: its class, its forward and its signature stay its own.


def before_forward(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Take the masks, and open the way for this forward."""
    stack = model.cropr
    slot = stack.slot
    kwargs = dict(kwargs)
    protect, padding = kwargs.pop("protect", None), kwargs.pop("padding", None)
    if slot.options is None or slot.options.predict is None:  # nobody has asked for more
        if stack.config.windows is not None:
            raise RuntimeError("with window attention a model gives features only: model.forward_features(images)")
        engine, whole = _takes_engine(model, kwargs), stack.spec.returns_tokens
        options = PruningOptions(protect, padding, engine=engine, whole=whole)
        _check_masks(model, options)
        slot.options, slot.state, slot.model, slot.stack = options, None, model, stack
    return args, kwargs


def after_forward(model: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """In training, the auxiliary predictions beside the output, or in the loss that a model of transformers gives."""
    stack = model.cropr
    slot = stack.slot
    if slot.options is None or slot.options.predict is not None:  # somebody else asked, who looks for himself
        return output
    aux = [] if slot.state is None else slot.state.aux
    slot.clear()
    if output is None or not aux:
        return output
    if getattr(output, "loss", None) is None:
        return output, aux
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    criterion = partial(model.loss_function, given["labels"], config=model.config, **given.get("kwargs", {}))
    output["loss"] = sum(map(criterion, map(of_image, aux)), output.loss)
    return output


def of_image(prediction: Tensor) -> Tensor:
    """One prediction (B, outputs) an image; several queries (B, M, outputs) are averaged."""
    return prediction if prediction.ndim == 2 else prediction.mean(1)


def forward_intermediates(model: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """timm's maps of several blocks, of a pruned model: of the last ones, in which all tokens are."""
    stack, own = model.cropr, type(model).forward_intermediates
    _require_whole_maps(stack, args[0] if args else kwargs.get("indices"))
    slot = stack.slot
    if slot.options is not None:  # the model's own forward calls it
        slot.options = slot.options._replace(engine=False)
        return own(model, x, *args, **kwargs)
    try:
        return own(model, x, *args, **kwargs)
    finally:
        slot.clear()


def _require_whole_maps(stack: CroprModules, indices: int | Sequence[int] | None) -> None:
    """ValueError where pruned tokens are not in all the maps that timm's `indices` name; wrong ones are for timm."""
    depth, config = len(stack.spec.blocks), stack.config
    if config.windows is not None:
        raise ValueError("cropr: with window attention there are no maps but the last: model.forward_features(images)")
    if config.schedule.rate == 0:
        return
    first = depth if config.llf is None and config.merge is None else depth - 1 - config.whole_blocks
    if indices is None or isinstance(indices, int):
        count = depth if indices is None else indices
        wanted = list(range(max(depth - count, 0), depth))
    else:
        wanted = [index + depth if index < 0 else index for index in indices]
    missing = [str(index) for index in wanted if 0 <= index < first]
    if missing:
        there = f"they are in those from {first} on" if first < depth else "they are in none"
        raise ValueError(
            f"cropr: pruned tokens are not in the maps of blocks {', '.join(missing)} (from 0), {there}; "
            "cropr.set_llf(model, cropr.Fusion(blocks=...)) restores them before more blocks"
        )


def keep_grid(stack: CroprModules, projection: nn.Module, args: Any, output: Any) -> None:
    """The patch grid, as the embedding has it."""
    stack.slot.grid = output.shape[-2:]


def fill_padding(stack: CroprModules, norm: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Heads that average over the patches see the mean of an image's own patches where its padding is."""
    slot = stack.slot
    padding, slot.padding = slot.padding, None
    return output if padding is None else level_padding(output, padding, stack.spec.num_prefix)


def _takes_engine(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether nothing between the blocks is asked for."""
    asked = ("output_hidden_states", "output_attentions")
    config = getattr(model, "config", None)
    if getattr(model, "_is_replica", False) or any(kwargs.get(name) for name in asked):
        return False
    return not any(getattr(config, name, False) for name in asked)


def _check_masks(model: Any, options: PruningOptions) -> None:
    stack: CroprModules = model.cropr
    name = type(model).__name__
    for mask, kind in ((options.protect, "protect"), (options.padding, "padding")):
        if mask is not None and stack.spec.refusal is not None:
            raise ValueError(f"cropr: {kind} is not supported for {name}: {stack.spec.refusal}")
    if options.padding is None:
        return
    if stack.config.merge is not None:
        raise ValueError("cropr: padding is not supported with merge=True: drop tokens instead")
    if stack.config.windows is not None:
        raise ValueError("cropr: padding is not supported with window attention")
    if stack.spec.pooling == "other":
        raise ValueError(
            "cropr: padding needs a head that takes the class token or averages over the patches; that of "
            f"{name} does neither"
        )
