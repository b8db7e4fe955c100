"""apply, remove, set_rate, deploy: put Cropr into a model that exists, in place, and take it out again."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import schedule as schedules
from .adapters import Anatomy, anatomy, find_adapter, fuse_blocks, reads_class_token
from .blocks import FusedBlock
from .engine import Graphs, run_stream
from .merging import Merge
from .modules import Cropr, FoldedCropr
from .passage import Passage, PrunedWithin, connect, disconnect
from .stream import Departures, Merging, Streamed, run_blocks
from .windows import Windows


class Embedded(NamedTuple):
    """Tokens that enter the first block (B, N, D), their rotary table, and P, the first tokens never pruned."""

    x: Tensor
    rope: Tensor | None
    num_prefix: int


class CroprModules(nn.ModuleList):
    """`model.cropr`: the Cropr modules in order, the schedule they follow, whether LLF ends it, how tokens merge."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        schedule: schedules.Bound,
        llf: bool,
        grid: tuple[int, int],
        merging: Merging | None = None,
        windows: Windows | None = None,
    ):
        super().__init__(modules)
        self.schedule, self.llf, self.merging, self.windows = schedule, llf, merging, windows
        self.grid = grid  # patches in height and width that schedules are checked against
        self.overridden: list[tuple[Any, str, Any]] = []  # attributes of the model that apply changed, for remove
        # Set by deploy: the blocks as the engine runs them, or why the functional ops run them; graphs, if any.
        self.engine: list[FusedBlock] | str = "for inference: cropr.deploy"
        self.graphs: Graphs | None = None
        self.passage: Passage | None = None  # of models that run their blocks themselves

    def __repr__(self) -> str:
        engine = f"off ({self.engine})" if isinstance(self.engine, str) else "on"
        merge = "" if self.merging is None else f", {self.merging.how}"
        return super().__repr__().replace("(", f"({self.schedule}, llf={self.llf}{merge}, engine {engine}", 1)


class Pruned:
    """Mixed into a model's class by `apply`: the same forward, through the pruned stream.

    In training the model returns (output, auxiliary predictions), in eval the output alone.
    """

    cropr: CroprModules

    def cropr_features(
        self: Any, images: Tensor, *, whole: bool = True, predict: bool | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Tokens after the last norm and auxiliary predictions (by default empty in eval).

        Where tokens merged, `whole` copies each of them to all the positions that it stands for. With windows it is
        the patches alone, (B, patches, D), and predictions (B, patches, outputs), in order of position.
        """
        predict = self.training if predict is None else predict
        x, rope, prefix = self.cropr_embed(images)
        stack: CroprModules = self.cropr
        engine, merging = stack.engine, stack.merging
        aux: list[Tensor] = []
        if isinstance(engine, str) or self.training or predict or _exporting() or _needs_gradient(x):
            x, aux, rows, _ = self.cropr_stream(images, embedded=Embedded(x, rope, prefix), predict=predict)
            x = self.norm(x)
        else:
            counts = stack.schedule(x.shape[1], len(self.blocks), prefix, stack.llf)
            parts = {"num_prefix": prefix, "llf": stack.llf, "rope": rope}
            how = None if merging is None else merging.how
            x, rows = run_stream(engine, stack, counts, x.contiguous(), self.norm, merge=how, **parts)
        if whole and rows is not None and not stack.llf:
            x = torch.ops.cropr.gather(x, rows)
        if stack.windows is not None:
            grid = _grid_of(self, images)
            x, aux = stack.windows.join(x, grid), [stack.windows.join(prediction, grid) for prediction in aux]
        return x, aux

    def cropr_embed(self: Any, images: Tensor) -> Embedded:
        """The tokens that enter the first block; with windows one window a row, and no prefix tokens."""
        x, rope = find_adapter(self).embed(self, images)
        windows: Windows | None = self.cropr.windows
        if windows is None:
            return Embedded(x, rope, self.num_prefix_tokens)
        grid = _grid_of(self, images)
        rope = None if rope is None else windows.rope(rope, grid, len(images))
        return Embedded(windows.split(x[:, self.num_prefix_tokens :], grid), rope, 0)

    def cropr_stream(
        self: Any,
        images: Tensor,
        *,
        embedded: Embedded | None = None,
        departures: Departures | None = None,
        predict: bool | None = None,
        collect: bool = False,
    ) -> Streamed:
        """The functional stream through the blocks, from images (B, C, H, W) or from what they were embedded to."""
        stack: CroprModules = self.cropr
        x, rope, prefix = self.cropr_embed(images) if embedded is None else embedded
        blocks = self.blocks if stack.windows is None else stack.windows.blocks(self.blocks, _grid_of(self, images))
        return run_blocks(
            blocks,
            stack,
            stack.schedule(x.shape[1], len(blocks), prefix, stack.llf),
            x,
            num_prefix=prefix,
            llf=stack.llf,
            rope=rope,
            training=self.training if predict is None else predict,
            recompute=self.training and getattr(self, "grad_checkpointing", False),
            departures=departures,
            merging=stack.merging,
            collect=collect,
        )

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens after the last norm: those kept, or all in original order with LLF or where tokens merge."""
        return self.cropr_features(images)[0]

    def forward(self: Any, images: Tensor) -> Tensor | tuple[Tensor, list[Tensor]]:
        graphs = self.cropr.graphs
        plain = not (self.training or torch.compiler.is_compiling() or _needs_gradient(images))
        if graphs is not None and images.is_cuda and plain:
            with torch.no_grad():
                return graphs(lambda batch: self.cropr_output(batch)[0], images, self.cropr_key(images))
        output, aux = self.cropr_output(images)
        return (output, aux) if self.training else output

    def cropr_output(self: Any, images: Tensor, *, predict: bool | None = None) -> tuple[Tensor, list[Tensor]]:
        """The output and the auxiliary predictions: by default those of training, none in eval.

        Raises:
            RuntimeError: with window attention there are no prefix tokens, and no head for images.
        """
        if self.cropr.windows is not None:
            raise RuntimeError("with window attention a model gives features only: model.forward_features(images)")
        x, aux = self.cropr_features(images, whole=not reads_class_token(self), predict=predict)
        return self.forward_head(x), aux

    def cropr_key(self: Any, images: Tensor) -> tuple[Any, ...]:
        """All that decides what a captured graph computes: shapes, schedule, precision, where the weights are."""
        weight = next(self.parameters())
        device = images.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        placed = (images.shape, images.dtype, images.device, weight.data_ptr(), weight.dtype)
        how = None if self.cropr.merging is None else self.cropr.merging.how
        return *placed, str(self.cropr.schedule), self.cropr.llf, how, autocast

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("forward_intermediates would run the blocks unpruned; call cropr.remove(model) first")


def _exporting() -> bool:
    """Whether torch.export traces (its default, non-strict way): exported programs hold the functional ops."""
    # Dynamo up to torch 2.11 takes is_exporting() for true in torch.compile as well.
    return not torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting()


def _needs_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


_pruned_classes: dict[type, type] = {}


def _pruned_class(base: type, mixin: type) -> type:
    if base not in _pruned_classes:
        _pruned_classes[base] = type(f"Cropr{base.__name__}", (mixin, base), {"__module__": __name__})
    return _pruned_classes[base]


def require_pruned(model: Any, caller: str) -> CroprModules:
    """The modules of a pruned model.

    Raises:
        TypeError: the model is not pruned; the message names the caller.
    """
    if not isinstance(model, Pruned | PrunedWithin):
        raise TypeError(f"{caller}: the model is not pruned; call cropr.apply(model, rate=...) first")
    return model.cropr


def apply(
    model: Any,
    *,
    rate: int | None = None,
    keep: Sequence[int] | str | Path | None = None,
    ratio: float | None = None,
    llf: bool = False,
    const: tuple[int, int] | None = None,
    merge: bool | Merge = False,
    windows: Windows | None = None,
    img_size: tuple[int, int] | None = None,
    num_queries: int = 1,
    num_outputs: int | None = None,
    mlp_ratio: float = 4.0,
    num_heads: int | None = None,
    stop_gradient: bool = True,
    sampling: bool = False,
) -> Any:
    """Put Cropr modules between the blocks of a model, in place.

    The backbone's parameters, names and weights stay as they are; `model.cropr` is added, one module per pruned
    block. Afterwards model(images) returns (output, auxiliary predictions) in training and the output in eval.

    A transformers or torchvision model keeps its own forward, and all its outputs; with `llf` its last_hidden_state has
    every token in the original order, without it those that stayed.

    Args:
        model: `cropr_kernels.vit.ViT`, timm VisionTransformer or Eva; transformers ViT, ViT-MAE, DINOv2 (with
            registers), DINOv3, SigLIP or CLIP vision; torchvision VisionTransformer.
        rate, keep, ratio, const: the schedule; exactly one, see `cropr_kernels.schedule`. keep may be a file that
            `cropr tune` wrote.
        llf: Last Layer Fusion: all tokens return before the last block.
        merge: tokens that leave merge into those that stay, instead of being lost: best for a model that was not
            trained to be pruned. Outputs cover all positions: a merged token is copied to all that it stands for. A
            `Merge` says how; True is `Merge()`.
        windows: window attention; every window drops equally many, so schedules count the tokens of one window. Needs
            llf. The class token and registers are left out, and the model gives features (B, patches, D) only.
        img_size: height and width in pixels that the schedule is for; default the model's own. Other sizes still run.
        num_queries: M, 1 for classification, one per patch for dense tasks (with windows: per patch of a window).
        num_outputs: width of the auxiliary predictions; default the model's classes; 0 for none.
        mlp_ratio, num_heads, stop_gradient, sampling: options of `Cropr`.

    Returns:
        The same model.

    Raises:
        TypeError: the model's family is not known.
        ValueError: the model is pruned already, the schedule does not fit it, tokens shall merge in blocks whose
            attention cannot weigh them, or windows come without llf, with merge, or for a model that runs its blocks
            itself.
    """
    if isinstance(model, Pruned | PrunedWithin):
        raise ValueError(
            "cropr.apply: the model is pruned already; cropr.set_rate changes the rate, cropr.remove undoes"
        )
    known = anatomy(model)
    if known.hosted and (merge or windows):
        raise ValueError(
            f"cropr.apply: {type(model).__name__} runs its blocks itself: merge and windows are for timm models and "
            "cropr_kernels.vit.ViT"
        )
    if windows is not None and (not llf or merge):
        raise ValueError("cropr.apply: windows need llf=True, so that the map is whole again, and do not merge")
    schedule = schedules.resolve(rate=rate, keep=keep, ratio=ratio, const=const)
    depth = len(known.blocks)
    count = schedules.num_modules(depth, llf)
    outputs = known.num_classes if num_outputs is None else num_outputs
    options: dict[str, Any] = dict(num_heads=num_heads, stop_gradient=stop_gradient, sampling=sampling)
    modules = [Cropr(known.dim, outputs, num_queries, mlp_ratio, **options) for _ in range(count)]
    merging = Merging(merge if isinstance(merge, Merge) else Merge(), _sized_blocks(model)) if merge else None
    patch = known.patch_size
    grid = known.grid if img_size is None else (img_size[0] // patch[0], img_size[1] // patch[1])
    stack = CroprModules(modules, schedule, llf, grid, merging, windows)
    schedule(*_default_tokens(known, stack), llf)  # refuse now what could only fail later
    model.cropr = stack.to(next(model.parameters()).device).train(model.training)
    if llf:
        # All tokens meet again in the last block: dropping it for some images would drop the fusion.
        for module in known.blocks[-1].modules():
            if getattr(module, "drop_prob", 0.0):
                _override(stack, module, "drop_prob", 0.0)
    if windows is not None:
        for block in known.blocks:  # rotary positions start at the first token now
            for name in ("num_prefix", "num_prefix_tokens"):
                if hasattr(block.attn, name):
                    _override(stack, block.attn, name, 0)
    if known.hosted:
        stack.passage = Passage(stack, depth, known.num_prefix)
        connect(known.blocks, stack.passage)
    model.__class__ = _pruned_class(type(model), PrunedWithin if known.hosted else Pruned)
    return model


def _override(stack: CroprModules, module: Any, name: str, value: Any) -> None:
    stack.overridden.append((module, name, getattr(module, name)))
    setattr(module, name, value)


def _sized_blocks(model: Any) -> list[FusedBlock]:
    fused = fuse_blocks(model)
    blocks = [] if isinstance(fused, str) else fused
    why = [f"block {i}: {block.parts}" for i, block in enumerate(blocks) if isinstance(block.parts, str)]
    if isinstance(fused, str) or why:
        raise ValueError(f"cropr.apply: merge needs attention that weighs tokens: {why[0] if why else fused}")
    return blocks


def _default_tokens(known: Anatomy, stack: CroprModules) -> tuple[int, int, int]:
    """Tokens in a row of the batch at the image size of apply, blocks, and prefix tokens: what schedules take."""
    depth = len(known.blocks)
    if stack.windows is not None:
        return stack.windows.size**2, depth, 0
    height, width = stack.grid
    return known.num_prefix + height * width, depth, known.num_prefix


def remove(model: Any) -> Any:
    """Undo `apply` in place: class, parameters and stochastic depth are those of before.

    Raises:
        TypeError: the model is not pruned.
    """
    stack = require_pruned(model, "cropr.remove")
    for module, name, value in stack.overridden:
        setattr(module, name, value)
    if stack.passage is not None:
        disconnect(anatomy(model).blocks)
    del model.cropr
    model.__class__ = type(model).__mro__[2]
    return model


def set_rate(model: Any, rate: int) -> Any:
    """Prune with another constant rate from now on, in place: one model serves many rates.

    Raises:
        TypeError: the model is not pruned.
        ValueError: the rate drops more tokens than there are at the image size given to apply.
    """
    stack = require_pruned(model, "cropr.set_rate")
    schedule = schedules.resolve(rate=rate)
    schedule(*_default_tokens(anatomy(model), stack), stack.llf)
    stack.schedule = schedule
    return model


def set_progress(model: Any, share: float) -> Any:
    """Prune only this share of what the schedule prunes, in place: the curriculum of a training run.

    Args:
        model: pruned by `apply`.
        share: from 0, nothing, to 1, all.

    Raises:
        TypeError: the model is not pruned.
        ValueError: share is outside [0, 1].
    """
    stack = require_pruned(model, "cropr.set_progress")
    stack.schedule = stack.schedule.at(share)
    return model


def deploy(model: Any, *, engine: bool = True, cuda_graphs: int = 0) -> Any:
    """Return a copy for inference: eval, frozen, auxiliary parts gone, M queries folded into one per layer.

    The argument stays as it was. A rate of 0 gives the unpruned model on the same engine.

    Args:
        model: pruned by `apply`.
        engine: run the blocks on the zero-copy engine (`cropr_kernels.engine`) where it knows them; the logits are then
            those of model.eval() up to rounding. Blocks it does not know use the functional ops; `cropr info MODEL`
            and the repr of `model.cropr` say so and why. False: functional ops, logits of model.eval() bit for bit.
            Inputs that require a gradient, and `pruning_map`, take the functional ops too.
        cuda_graphs: capture forward in a CUDA graph per (shape, schedule, precision), at most so many at a time, and
            replay it; 0 for none. Each graph holds the memory of one forward. CPU inputs, inputs that require a
            gradient and torch.compile ignore it.

    Raises:
        TypeError: the model is not pruned.
        ValueError: cuda_graphs is negative, or the model runs its blocks itself.
    """
    stack = require_pruned(model, "cropr.deploy")
    if cuda_graphs < 0:
        raise ValueError(f"cropr.deploy: cuda_graphs must be >= 0, got {cuda_graphs}")
    if cuda_graphs and stack.passage is not None:
        raise ValueError(f"cropr.deploy: cuda_graphs cannot capture {type(model).__name__}; use torch.compile")
    folded = [FoldedCropr(module) if isinstance(module, Cropr) else copy.deepcopy(module) for module in stack]
    light = CroprModules(folded, stack.schedule, stack.llf, stack.grid, windows=stack.windows)
    deployed = copy.deepcopy(model, memo={id(stack): light})  # the copy takes `light` wherever the model has `stack`
    light.merging = None if stack.merging is None else Merging(stack.merging.how, _sized_blocks(deployed))
    if stack.passage is not None:
        light.passage = anatomy(deployed).blocks[0].cropr_passage[0]
        light.engine = "the model runs its blocks itself"
    elif stack.windows is not None:
        light.engine = "window attention"
    else:
        light.engine = fuse_blocks(deployed) if engine else "switched off by deploy(engine=False)"
    light.graphs = Graphs(cuda_graphs) if cuda_graphs else None
    return deployed.eval().requires_grad_(False)


@torch.no_grad()
def pruning_map(model: Any, images: Tensor) -> Tensor:
    """When each patch left: (B, grid height, grid width) int64, the number of blocks it went through.

    Patches that were never pruned hold the depth of the network.

    Args:
        model: pruned by `apply`; it is read in its current mode.
        images: (B, C, H, W).

    Raises:
        TypeError: the model is not pruned.
    """
    stack, known = require_pruned(model, "cropr.pruning_map"), anatomy(model)
    patch, windows, depth = known.patch_size, stack.windows, len(known.blocks)
    grid = images.shape[2] // patch[0], images.shape[3] // patch[1]
    embedded = None if known.hosted else model.cropr_embed(images)
    prefix = known.num_prefix if embedded is None else embedded.num_prefix
    shape = (len(images), grid[0] * grid[1]) if embedded is None else (len(embedded.x), embedded.x.shape[1] - prefix)
    left = torch.full(shape, depth, dtype=torch.int64, device=images.device)

    def record(layer: int, positions: Tensor) -> None:
        left.scatter_(1, positions - prefix, layer + 1)

    if stack.passage is not None:
        stack.passage.departures = record
        try:
            model(images)
        finally:
            stack.passage.departures = None
    else:
        model.cropr_stream(images, embedded=embedded, departures=record, predict=False)
    if windows is not None:
        left = windows.join(left.unsqueeze(-1), grid).squeeze(-1)
    return left.unflatten(1, grid)


@torch.no_grad()
def merge_map(model: Any, images: Tensor) -> Tensor:
    """Which token each patch ended in: (B, grid height, grid width) int64; patches with one number are one token.

    Numbers count the patches that stayed, in order of position, from 0. With LLF it is the state before all return.

    Args:
        model: pruned by `apply` with merge; it is read in its current mode.
        images: (B, C, H, W).

    Raises:
        TypeError: the model is not pruned.
        ValueError: its tokens do not merge.
    """
    if require_pruned(model, "cropr.merge_map").merging is None:
        raise ValueError("cropr.merge_map: the model's tokens do not merge; cropr.apply(model, ..., merge=True)")
    grid, prefix = _grid_of(model, images), model.num_prefix_tokens
    rows = model.cropr_stream(images, predict=False).rows
    if rows is None:  # nothing was pruned
        rows = torch.arange(prefix + grid[0] * grid[1], device=images.device).repeat(len(images), 1)
    return (rows[:, prefix:] - prefix).unflatten(1, grid)


def _grid_of(model: Any, images: Tensor) -> tuple[int, int]:
    patch = model.patch_embed.patch_size
    return images.shape[2] // patch[0], images.shape[3] // patch[1]
