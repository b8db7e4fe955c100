"""apply, remove, set_rate, deploy: put Cropr into a model that exists, in place, and take it out again."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import schedule as schedules
from .adapters import find_adapter, fuse_blocks, reads_class_token
from .blocks import FusedBlock
from .engine import Graphs, run_stream
from .merging import Merge
from .modules import Cropr, FoldedCropr
from .stream import Departures, Merging, Streamed, run_blocks


class CroprModules(nn.ModuleList):
    """`model.cropr`: the Cropr modules in order, the schedule they follow, whether LLF ends it, how tokens merge."""

    def __init__(
        self, modules: Sequence[nn.Module], schedule: schedules.Bound, llf: bool, merging: Merging | None = None
    ):
        super().__init__(modules)
        self.schedule, self.llf, self.merging = schedule, llf, merging
        self.last_drop_path: list[tuple[Any, float]] = []  # what LLF switched off, for remove
        # Set by deploy: the blocks as the engine runs them, or why the functional ops run them; graphs, if any.
        self.engine: list[FusedBlock] | str = "for inference: cropr.deploy"
        self.graphs: Graphs | None = None

    def __repr__(self) -> str:
        engine = f"off ({self.engine})" if isinstance(self.engine, str) else "on"
        merge = "" if self.merging is None else f", {self.merging.how}"
        return super().__repr__().replace("(", f"({self.schedule}, llf={self.llf}{merge}, engine {engine}", 1)


class Pruned:
    """Mixed into a model's class by `apply`: the same forward, through the pruned stream.

    In training the model returns (output, auxiliary predictions), in eval the output alone.
    """

    cropr: CroprModules

    def cropr_features(self: Any, images: Tensor, *, whole: bool = True) -> tuple[Tensor, list[Tensor]]:
        """Tokens after the last norm and auxiliary predictions (empty in eval).

        Where tokens merged, `whole` copies each of them to all the positions that it stands for.
        """
        x, rope = find_adapter(self).embed(self, images)
        stack: CroprModules = self.cropr
        engine, merging = stack.engine, stack.merging
        aux: list[Tensor] = []
        if isinstance(engine, str) or self.training or _exporting() or _needs_gradient(x):
            x, aux, rows = self.cropr_stream(x, rope)
            x = self.norm(x)
        else:
            counts = stack.schedule(x.shape[1], len(self.blocks), self.num_prefix_tokens, stack.llf)
            parts = {"num_prefix": self.num_prefix_tokens, "llf": stack.llf, "rope": rope}
            how = None if merging is None else merging.how
            x, rows = run_stream(engine, stack, counts, x.contiguous(), self.norm, merge=how, **parts)
        if whole and rows is not None and not stack.llf:
            x = torch.ops.cropr.gather(x, rows)
        return x, aux

    def cropr_stream(self: Any, x: Tensor, rope: Tensor | None, departures: Departures | None = None) -> Streamed:
        """The functional stream through the blocks."""
        stack: CroprModules = self.cropr
        return run_blocks(
            self.blocks,
            stack,
            stack.schedule(x.shape[1], len(self.blocks), self.num_prefix_tokens, stack.llf),
            x,
            num_prefix=self.num_prefix_tokens,
            llf=stack.llf,
            rope=rope,
            training=self.training,
            recompute=self.training and getattr(self, "grad_checkpointing", False),
            departures=departures,
            merging=stack.merging,
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

    def cropr_output(self: Any, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output and the auxiliary predictions, whatever the mode."""
        x, aux = self.cropr_features(images, whole=not reads_class_token(self))
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


def _pruned_class(base: type) -> type:
    if base not in _pruned_classes:
        _pruned_classes[base] = type(f"Cropr{base.__name__}", (Pruned, base), {"__module__": __name__})
    return _pruned_classes[base]


def require_pruned(model: Any, caller: str) -> CroprModules:
    """The modules of a pruned model.

    Raises:
        TypeError: the model is not pruned; the message names the caller.
    """
    if not isinstance(model, Pruned):
        raise TypeError(f"{caller}: the model is not pruned; call cropr.apply(model, rate=...) first")
    return model.cropr


def apply(
    model: Any,
    *,
    rate: int | None = None,
    keep: Sequence[int] | None = None,
    ratio: float | None = None,
    llf: bool = False,
    merge: bool | Merge = False,
    num_queries: int = 1,
    num_outputs: int | None = None,
    mlp_ratio: float = 4.0,
) -> Any:
    """Put Cropr modules between the blocks of a model, in place.

    The backbone's parameters, names and weights stay as they are; `model.cropr` is added, one module per pruned
    block. Afterwards model(images) returns (output, auxiliary predictions) in training and the output in eval.

    Args:
        model: `cropr_kernels.vit.ViT`, timm VisionTransformer or timm Eva.
        rate, keep, ratio: the schedule; exactly one, see `cropr_kernels.schedule`.
        llf: Last Layer Fusion: all tokens return before the last block.
        merge: tokens that leave merge into those that stay, instead of being lost: best for a model that was not
            trained to be pruned. Outputs cover all positions: a merged token is copied to all that it stands for. A
            `Merge` says how; True is `Merge()`.
        num_queries: M, 1 for classification, one per patch for dense tasks.
        num_outputs: width of the auxiliary predictions; default the model's classes; 0 for none.
        mlp_ratio: hidden width of the aggregators' MLP over D.

    Returns:
        The same model.

    Raises:
        TypeError: the model's family is not known.
        ValueError: the model is pruned already, the schedule does not fit it, or tokens shall merge in blocks whose
            attention cannot weigh them.
    """
    if isinstance(model, Pruned):
        raise ValueError(
            "cropr.apply: the model is pruned already; cropr.set_rate changes the rate, cropr.remove undoes"
        )
    find_adapter(model)
    schedule = schedules.resolve(rate=rate, keep=keep, ratio=ratio)
    depth, prefix = len(model.blocks), model.num_prefix_tokens
    count = schedules.num_modules(depth, llf)
    schedule(_default_tokens(model), depth, prefix, llf)  # refuse now what could only fail later
    outputs = model.num_classes if num_outputs is None else num_outputs
    example = next(model.parameters())
    modules = [Cropr(model.embed_dim, outputs, num_queries, mlp_ratio).to(example.device) for _ in range(count)]
    merging = Merging(merge if isinstance(merge, Merge) else Merge(), _sized_blocks(model)) if merge else None
    model.cropr = CroprModules(modules, schedule, llf, merging).train(model.training)
    if llf:
        # All tokens meet again in the last block: dropping it for some images would drop the fusion.
        for module in model.blocks[-1].modules():
            if getattr(module, "drop_prob", 0.0):
                model.cropr.last_drop_path.append((module, module.drop_prob))
                module.drop_prob = 0.0
    model.__class__ = _pruned_class(type(model))
    return model


def _sized_blocks(model: Any) -> list[FusedBlock]:
    fused = fuse_blocks(model)
    blocks = [] if isinstance(fused, str) else fused
    why = [f"block {i}: {block.parts}" for i, block in enumerate(blocks) if isinstance(block.parts, str)]
    if isinstance(fused, str) or why:
        raise ValueError(f"cropr.apply: merge needs attention that weighs tokens: {why[0] if why else fused}")
    return blocks


def default_grid(model: Any) -> tuple[int, int]:
    """Patches in height and width at the model's own image size."""
    return getattr(model.patch_embed, "grid_size", None) or (model.grid, model.grid)


def _default_tokens(model: Any) -> int:
    height, width = default_grid(model)
    return model.num_prefix_tokens + height * width


def remove(model: Any) -> Any:
    """Undo `apply` in place: class, parameters and stochastic depth are those of before.

    Raises:
        TypeError: the model is not pruned.
    """
    stack = require_pruned(model, "cropr.remove")
    for module, drop_prob in stack.last_drop_path:
        module.drop_prob = drop_prob
    del model.cropr
    model.__class__ = type(model).__mro__[2]
    return model


def set_rate(model: Any, rate: int) -> Any:
    """Prune with another constant rate from now on, in place: one model serves many rates.

    Raises:
        TypeError: the model is not pruned.
        ValueError: the rate drops more tokens than there are at the model's image size.
    """
    stack = require_pruned(model, "cropr.set_rate")
    schedule = schedules.resolve(rate=rate)
    schedule(_default_tokens(model), len(model.blocks), model.num_prefix_tokens, stack.llf)
    stack.schedule = schedule
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
        ValueError: cuda_graphs is negative.
    """
    stack = require_pruned(model, "cropr.deploy")
    if cuda_graphs < 0:
        raise ValueError(f"cropr.deploy: cuda_graphs must be >= 0, got {cuda_graphs}")
    folded = [FoldedCropr(module) if isinstance(module, Cropr) else copy.deepcopy(module) for module in stack]
    light = CroprModules(folded, stack.schedule, stack.llf)
    deployed = copy.deepcopy(model, memo={id(stack): light})  # the copy takes `light` wherever the model has `stack`
    light.merging = None if stack.merging is None else Merging(stack.merging.how, _sized_blocks(deployed))
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
    require_pruned(model, "cropr.pruning_map")
    height, width = _grid_of(model, images)
    prefix, depth = model.num_prefix_tokens, len(model.blocks)
    left = torch.full((images.shape[0], height * width), depth, dtype=torch.int64, device=images.device)

    def record(layer: int, positions: Tensor) -> None:
        left.scatter_(1, positions - prefix, layer + 1)

    model.cropr_stream(*find_adapter(model).embed(model, images), departures=record)
    return left.unflatten(1, (height, width))


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
    rows = model.cropr_stream(*find_adapter(model).embed(model, images)).rows
    if rows is None:  # nothing was pruned
        rows = torch.arange(prefix + grid[0] * grid[1], device=images.device).repeat(len(images), 1)
    return (rows[:, prefix:] - prefix).unflatten(1, grid)


def _grid_of(model: Any, images: Tensor) -> tuple[int, int]:
    patch = model.patch_embed.patch_size
    return images.shape[2] // patch[0], images.shape[3] // patch[1]
