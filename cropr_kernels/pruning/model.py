"""A pruned model: `model.cropr`, and the hooks before and after its own forward."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..models.adapters import BlockParts, ModelSpec, Submodule, find_spec, is_hooked
from ..models.pixels import Pixels
from ..schedule import num_modules
from .block_wrapper import fill_padding
from .budget import Thresholds
from .config import PruningConfig
from .graphs import Graphs
from .input_checks import check_masks, take_patches
from .module import Scorer
from .predictions import add_predictions
from .state import ForwardContext, ForwardContexts, PruningOptions, PruningState

T = TypeVar("T")
Kwargs = Mapping[str, object]


class ReplacedAttribute(NamedTuple):
    """An attribute that `apply` changed, and its value before."""

    module: nn.Module
    name: str
    value: object


class CroprModules(nn.ModuleList):
    """`model.cropr`: the Cropr modules in order, their configuration, and the specification of the
    model.

    Args:
        modules: one per pruned block.
        config: how they prune.
        spec: of the model.
    """

    def __init__(self, modules: Sequence[nn.Module], config: PruningConfig, spec: ModelSpec):
        super().__init__(modules)
        self.config = config
        self.spec = spec
        self.contexts = ForwardContexts()
        self.traced_context = ForwardContext()
        self.recompute = False  # run blocks again in backward instead of keeping their activations
        # Undone by `remove`.
        self.hooks: list[RemovableHandle] = []
        self.replaced: list[ReplacedAttribute] = []
        self.links: list[Submodule] = []  # from the model to its blocks
        # Set by `deploy`: the blocks as the engine runs them, or the reason why it does not;
        # graphs, if any.
        self.engine: list[BlockParts] | None = None
        self.watched: list[Submodule] = []
        self.linear_layers: list[nn.Linear] = []  # that the engine runs
        self.engine_reason = "for inference: cropr.deploy"
        self.graphs: Graphs | None = None
        self.warned = False  # of random queries
        self.calibrated = False  # in closed form, or loaded from a file of such queries
        self.thresholds: Thresholds | None = None  # of merging, if they are calibrated
        self.pixels: Pixels | None = None  # the preparation of images, if `load` knows it

    def scorer(self, layer: int) -> Scorer:
        """The module after block `layer`."""
        return cast(Scorer, self._modules[str(layer)])

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Leave out modules that fusion over more blocks does not use."""
        for name in [name for name in state_dict if name.startswith(prefix)]:
            module = name[len(prefix) :].partition(".")[0]
            if self.config.llf is not None and module.isdecimal() and int(module) >= len(self):
                del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def num_used(self) -> int:
        """The number of modules that prune: fusion over more blocks, set later, leaves some
        unused."""
        return num_modules(len(self.spec.blocks), self.config.full_blocks)

    @property
    def selects_by_query(self) -> bool:
        """Every module keeps the tokens of the highest product with its query."""
        return all(type(module).forward is Scorer.forward for module in self)

    @property
    def has_counts_by_image(self) -> bool:
        """Each image keeps as many tokens as it needs, on the engine."""
        config = self.config
        return (
            self.engine is not None
            and self.thresholds is not None
            and config.merge is not None
            and bool(config.schedule.rate)
        )

    @property
    def context(self) -> ForwardContext:
        """The forward of this thread. torch.compile cannot trace thread-local state: it has one for
        all threads."""
        traced = self.traced_context
        is_traced = traced.options is not None or traced.state is not None
        return traced if is_traced or torch.compiler.is_compiling() else self.contexts.current

    def engine_is_clear(self) -> bool:
        """Tell whether the blocks are still those that deploy saw: no hooks, and no other layers in
        them."""
        for owner, name, module in self.watched:
            if owner._modules.get(name) is not module or is_hooked(module):
                return False
        return not any(is_hooked(parts.block) for parts in self.engine or ())

    def require_same_blocks(self) -> None:
        """Raise RuntimeError if the model does not run the blocks that it had in `apply`."""
        if torch.compiler.is_compiling():
            return
        for owner, name, module in self.links:
            if owner._modules.get(name) is not module:
                raise RuntimeError(
                    "cropr: the blocks of the model are not those of cropr.apply: a list of them "
                    "was cut or replaced; "
                    "change them before cropr.apply, or call cropr.remove first"
                )

    def follow_head(self, model: nn.Module) -> None:
        """Specify the model anew if its head has changed since `apply`; the auxiliary heads stay as
        they are."""
        if any(getattr(model, name, None) != value for name, value in self.spec.head):
            self.spec = replace(find_spec(model), num_classes=self.spec.num_classes)

    def __repr__(self) -> str:
        engine = f"off ({self.engine_reason})" if self.engine is None else "on"
        return super().__repr__().replace("(", f"({self.config}, engine {engine}", 1)


def is_pruned(model: nn.Module) -> bool:
    """Tell whether `apply` has pruned the model."""
    return isinstance(getattr(model, "cropr", None), CroprModules)


def modules_of(model: nn.Module) -> CroprModules:
    """The Cropr modules of a pruned model."""
    return model.cropr  # type: ignore[return-value]


def require_pruned(model: nn.Module, caller: str) -> CroprModules:
    """Return the modules of a pruned model; raise TypeError, which names the caller, for any
    other."""
    if not is_pruned(model):
        raise TypeError(
            f"{caller}: the model is not pruned; call cropr.apply(model, rate=...) first"
        )
    modules = modules_of(model)
    modules.follow_head(model)
    return modules


def warn_of_random_queries(model: nn.Module, caller: str, stacklevel: int = 3) -> None:
    """Warn once of a pruned model if its queries are random; a decorator of the caller is one more
    level."""
    modules = modules_of(model)
    if modules.warned or modules.config.schedule.rate == 0:
        return
    if not any(isinstance(module, Scorer) and module.is_random() for module in modules):
        return
    modules.warned = True
    warnings.warn(
        f"{caller}: the queries are random, so what is pruned is arbitrary; call "
        "cropr.calibrate(model, images), "
        "cropr.load_queries(model, file), or train first",
        stacklevel=stacklevel,
    )


def run(model: nn.Module, call: Callable[[], T], options: PruningOptions) -> tuple[T, PruningState]:
    """Call call(), which runs the model, and return its result with the state of its forward.

    Raises ValueError if a mask does not fit the model.
    """
    modules = modules_of(model)
    context = modules.context
    check_masks(modules, type(model).__name__, options)
    context.options = options._replace(predict=bool(options.predict))
    context.opened_by_hook = False
    context.state = None
    context.modules = modules
    try:
        output = call()
        return output, cast(PruningState, context.state)
    finally:
        context.clear()


def features(
    model: nn.Module,
    images: Tensor,
    *,
    protect: Tensor | None = None,
    padding: Tensor | None = None,
    predict: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Compute tokens after the last norm, (B, K, D), and auxiliary predictions, of a timm model or
    `cropr_kernels.ViT`.

    Args:
        model: pruned by `apply`.
        images: (B, C, H, W).
        protect, padding: (B, grid height, grid width) bool, as `apply` describes them. Tokens of
            padding mean nothing.
        predict: compute the auxiliary predictions; otherwise there are none.

    Returns:
        The tokens kept; all in their original order with Last Layer Fusion or if tokens merged
        (each copied to all positions that it stands for); with windows the patches alone.

    Raises:
        TypeError: the model is not pruned.
        ValueError: a mask does not fit.
    """
    require_pruned(model, "cropr.features")
    options = PruningOptions(protect=protect, padding=padding, predict=predict, engine=True)
    forward_features: Any = model.forward_features
    tokens, state = run(model, lambda: forward_features(images), options)
    return tokens, state.aux


# Hooks on the model, which keeps its class, its forward and its signature.


def before_forward(
    model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Take the masks, and open the context of this forward unless `run` has."""
    modules = modules_of(model)
    context = modules.context
    kwargs = dict(kwargs)
    protect = cast(Tensor | None, kwargs.pop("protect", None))
    padding = cast(Tensor | None, kwargs.pop("padding", None))
    take_patches(modules, args, kwargs)
    if context.options is not None and not context.opened_by_hook:
        return args, kwargs
    if modules.config.windows is not None:
        raise RuntimeError(
            "with window attention a model gives features only: model.forward_features(images)"
        )
    modules.follow_head(model)
    if model.training and modules.thresholds is not None:
        _drop_thresholds(model)
    maps = _maps_asked_for(modules, model, kwargs)
    options = PruningOptions(
        protect,
        padding,
        engine=not maps,
        full=modules.spec.returns_tokens,
        maps=maps,
        restore=_reads_last(modules, maps),
    )
    check_masks(modules, type(model).__name__, options)
    context.options = options
    context.opened_by_hook = True
    context.state = None
    context.model = model
    context.modules = modules
    return args, kwargs


def _drop_thresholds(model: nn.Module) -> None:
    """Forget thresholds that are of other weights than training makes."""
    modules_of(model).thresholds = None
    options = getattr(getattr(model, "config", None), "cropr", None)
    if isinstance(options, dict):
        options.pop("thresholds", None)


def before_encoder(
    modules: CroprModules, encoder: nn.Module, args: tuple[object, ...], kwargs: Kwargs
) -> None:
    """See what is asked of the encoder where it is called, by whatever module around it."""
    take_patches(modules, args, kwargs)
    context = modules.context
    options = context.options
    if options is None:  # called by others than the model's own forward
        context.opened_by_encoder = True
        options = PruningOptions(engine=True)
    maps = options.maps | _maps_asked_for(modules, encoder, kwargs)
    context.options = options._replace(
        engine=options.engine and not maps,
        maps=maps,
        restore=options.restore or _reads_last(modules, maps),
    )


def after_encoder(
    modules: CroprModules, encoder: nn.Module, args: tuple[object, ...], output: object
) -> None:
    """Close the context if `before_encoder` opened it."""
    context = modules.context
    if context.opened_by_encoder:
        context.clear()


def after_forward(
    model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: Any
) -> object:
    """In training, return the auxiliary predictions beside the output; a Hugging Face model returns
    them in it."""
    modules = modules_of(model)
    context = modules.context
    if not context.opened_by_hook:
        return output
    aux = [] if context.state is None else context.state.aux
    context.clear()
    if output is None or not aux:
        return output
    return add_predictions(model, args, kwargs, output, aux, modules.spec.num_classes)


# Methods of encoders that return maps of their blocks: of timm, and of DINOv2's and DINOv3's code
MAP_METHODS = ("forward_intermediates", "get_intermediate_layers")


def with_full_maps(
    modules: CroprModules, encoder: nn.Module, name: str, *args: Any, **kwargs: Any
) -> object:
    """Run a method that returns maps of blocks on a pruned model: all of them have all tokens."""
    method: Callable[..., object] = getattr(type(encoder), name)
    if modules.config.windows is not None:
        raise ValueError(
            "cropr: with window attention there are no maps but the last: "
            "model.forward_features(images)"
        )
    context = modules.context
    outer = context.options
    maps = frozenset(range(len(modules.spec.blocks)))
    context.options = (outer or PruningOptions())._replace(engine=False, maps=maps, restore=True)
    try:
        return method(encoder, *args, **kwargs)
    finally:
        context.options = outer
        if outer is None:  # else the model's own forward calls it
            context.clear()


def keep_grid(
    modules: CroprModules,
    projection: nn.Module,
    args: object,
    output: Tensor | tuple[Tensor, tuple[int, int] | None],
) -> None:
    """Note the patch grid (B, D, height, width) that the embedding makes, of a video (B, D, frames,
    height, width); or (height, width) beside the tokens, None for those that it took as patches."""
    if isinstance(output, tuple):
        modules.context.grid = output[1] or modules.context.grid
        return
    *frames, height, width = output.shape[2:]
    modules.context.frames = frames[0] if frames else None
    modules.context.grid = (frames[0] * height if frames else height), width


def after_norm(modules: CroprModules, norm: nn.Module, args: object, output: Tensor) -> Tensor:
    """Fill in padding after the last norm."""
    return fill_padding(modules, output)


def _maps_asked_for(modules: CroprModules, model: nn.Module, kwargs: Kwargs) -> frozenset[int]:
    """The blocks whose output somebody reads: by the arguments or the configuration of a model, or
    by its nature."""
    config = getattr(model, "config", None)
    names = ("output_hidden_states", "output_attentions")
    asked = [
        name
        for name in names
        if kwargs.get(name) or (kwargs.get(name) is None and getattr(config, name, False))
    ]
    if "output_attentions" in asked and modules.spec.map_blocks is not None:
        raise ValueError("cropr: blocks over maps return no attention: output_attentions is set")
    if asked:
        return frozenset(range(len(modules.spec.blocks)))
    layers = modules.spec.map_layers
    return frozenset((*layers, len(modules.spec.blocks) - 1)) if layers else frozenset()


def _reads_last(modules: CroprModules, maps: frozenset[int]) -> bool:
    """Tell whether the tokens after the last block are a map, and whatever pools them does not see
    it: models that collect hidden states in their own loop take the last from there."""
    return bool(maps) and modules.spec.pooling == "token"
