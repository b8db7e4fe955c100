"""Per-forward state: positions, sizes, masks, pruned tokens, auxiliary predictions.

It belongs to one forward and the thread that runs it, never to the model.
"""

import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..models.adapters import BlockParts, ModelSpec
from ..models.rotary import rotary_at
from ..ops import decompositions
from ..schedule import num_modules
from .budget import Budget, Thresholds
from .config import PruningConfig
from .masks import Masks, make_masks
from .merge_record import MergeRecord
from .merging import checkerboard
from .module import Scorer
from .portable import make_portable_strategy
from .strategies import Priorities, PruningStrategy, Reduction, make_strategy

# Patches in height and width; of a video, those of its frames below each other
Grid = tuple[int, int]


class PruningModules(Protocol):
    """The Cropr modules of a model (`CroprModules`), as its forward uses them."""

    config: PruningConfig
    spec: ModelSpec
    training: bool
    recompute: bool
    engine: list[BlockParts] | None
    linear_layers: list[nn.Linear]
    thresholds: Thresholds | None

    @property
    def context(self) -> "ForwardContext": ...

    def scorer(self, layer: int) -> Scorer: ...

    def engine_is_clear(self) -> bool: ...

    def require_same_blocks(self) -> None: ...


class PruningOptions(NamedTuple):
    """The options of one forward."""

    # (B, grid height, grid width) bool: patches kept while anything else can go
    protect: Tensor | None = None
    padding: Tensor | None = None  # (B, grid height, grid width) bool: positions that hold no patch
    predict: bool | None = None  # compute auxiliary predictions; None: if the model is in training
    # Called after every block with its tokens; nothing is pruned
    observe: Callable[[int, Tensor], None] | None = None
    # Keep the pruned tokens, those after the last block, and the rows after each pruning
    collect: bool = False
    engine: bool = False  # the engine may run the blocks: the caller looks at nothing between them
    full: bool = True  # copy each merged token to all positions that it stands for
    maps: frozenset[int] = frozenset()  # blocks whose output someone reads: it has all tokens
    restore: bool = False  # the tokens after the last block are all tokens too
    portable: bool = False  # standard operators alone, for exported files
    budget: Budget | None = None  # of each image's merges; None: that of the modules
    equal_counts: bool = False  # of tokens of each image, as graphs need them
    # In place of the blocks: called with the state, tokens (1, N, D) and rotary positions
    exchange: Callable[..., Tensor] | None = None


class ForwardContext:
    """The forward under way on one model, in one thread."""

    def __init__(self) -> None:
        self.options: PruningOptions | None = None  # of the forward under way, or about to begin
        # On the model's own forward; else by `run`, whose caller reads the state
        self.opened_by_hook = False
        # By the hook on the encoder, which others than the model call
        self.opened_by_encoder = False
        self.model: nn.Module | None = None  # a replica's own, if there are several
        self.modules: PruningModules | None = None
        # Of the images or videos that were just embedded
        self.grid: Grid | None = None
        self.frames: int | None = None
        self.state: PruningState | None = None
        # (B, K), of the tokens that the last norm is about to see
        self.padding: Tensor | None = None

    def clear(self) -> None:
        self.options = None
        self.opened_by_hook = False
        self.opened_by_encoder = False
        self.model = None
        self.modules = None
        self.state = None
        self.padding = None


class ForwardContexts(threading.local):
    """One context per thread."""

    def __init__(self) -> None:
        self.current = ForwardContext()

    def __reduce__(self) -> tuple[type["ForwardContexts"], tuple[()]]:
        return ForwardContexts, ()


class PruningState:
    """One batch on its way through the blocks.

    Args:
        modules: the Cropr modules of the model.
        x: (B, N, D), the tokens that enter the first block.
        options: those of the caller.
        grid, frames: patches in height and width, and frames of a video, if the embedding showed
            them.

    Raises:
        ValueError: a mask or the schedule does not fit the batch.
    """

    def __init__(
        self,
        modules: PruningModules,
        x: Tensor,
        options: PruningOptions,
        grid: Grid | None,
        frames: int | None = None,
    ):
        config = modules.config
        prefix = modules.spec.num_prefix
        depth = len(modules.spec.blocks)
        self.num_tokens = decompositions.static_size(x, 1)
        num_patches = self.num_tokens - prefix
        self.modules = modules
        self.config = config
        self.options = options
        self.grid = _infer_grid(num_patches, grid, config.grid)
        self.frames = frames or modules.spec.frames
        self.last_layer = depth - 1
        self.fused_after = depth if config.llf is None else self.last_layer - config.full_blocks
        self.num_scheduled = self.num_tokens  # tokens that the schedule counts
        if options.exchange is None:
            self.counts = config.counts(self.num_tokens, depth, prefix)
        else:
            self.counts = [self.num_tokens] * num_modules(depth, config.full_blocks)
        self.num_images = x.shape[0]
        self.num_prefix = prefix
        self.masks = make_masks(
            options.protect, options.padding, x.shape[0], num_patches, prefix, self.is_video
        )
        self.tracks_parents = config.tracks_parents or bool(options.maps) or options.restore
        self.keeps_pruned = options.collect or (
            config.llf is not None and not config.tracks_parents
        )
        # TorchScript and ONNX know standard operators only
        self.portable = options.portable or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
        if self.portable and self.masks is not None:
            raise ValueError("cropr: exported files take no masks: leave out protect and padding")
        self.ops = decompositions if self.portable else torch.ops.cropr
        self.next_layer = 0
        self.done = False  # the engine has run all blocks
        self.active: Tensor | None = None  # (B, K, D), if the model carries maps between its blocks
        self.positions: Tensor | None = None  # (B, K), of the active tokens; None: all, in order
        self.strategy: PruningStrategy | None = None  # from the first pruning on
        self.aux: list[Tensor] = []
        # Layer, and the positions (B, R) pruned after it
        self.pruned_idx: list[tuple[int, Tensor]] = []
        self.pruned_tokens: list[Tensor] = []  # (B, R, D), as they were pruned
        self.offsets: list[Tensor] = []  # (B, R, D), from their parents
        self.parent_idx: list[Tensor] = []  # (B, R), positions of the parents
        self.tokens: Tensor | None = None  # after the last block, if they are collected
        # (B, N) after each pruning: `row_idx` then, if it is collected
        self.collected_rows: list[Tensor] = []
        self.record: MergeRecord | None = None  # where images keep different numbers of tokens

    def note_grid(self, grid: Grid) -> None:
        """Take the patch grid of the image that the tokens are of, if it has as many patches."""
        self.grid = _infer_grid(
            self.num_tokens - self.num_prefix, grid, self.grid or self.config.grid
        )

    @property
    def is_video(self) -> bool:
        return self.modules.spec.frames > 1

    @property
    def predicts(self) -> bool:
        return self.modules.training if self.options.predict is None else self.options.predict

    @property
    def row_idx(self) -> Tensor | None:
        """The row of the kept tokens that each token merged into, (B, N); None if none has
        merged."""
        if self.record is not None:
            return self.record.rows(len(self.record.merges))
        return None if self.strategy is None else self.strategy.row_idx

    def budget(self) -> Budget | None:
        """The budget of each image's merges; None if all images keep equally many tokens.

        Images of another size than the calibrated, masks, graphs and lists of counts have equal
        counts.
        """
        if self.options.budget is not None:
            return self.options.budget
        thresholds = self.modules.thresholds
        schedule = self.config.schedule
        if thresholds is None or not schedule.rate or not schedule.share:
            return None
        if self.config.merge is None or self.masks is not None or self.options.equal_counts:
            return None
        if torch.compiler.is_compiling() or thresholds.num_tokens != self.num_tokens:
            return None
        if thresholds.num_modules < len(self.counts):  # fusion was over more blocks then
            return None
        return thresholds.at(schedule.share * schedule.rate)

    def before_block(self, layer: int, x: Tensor) -> Tensor:
        """Arrange the tokens x (B, K, D) for a block."""
        return x

    def after_block(self, layer: int, x: Tensor) -> Tensor:
        """Prune the output of a block, or restore all tokens if the fusion follows."""
        if layer < len(self.counts):
            x = self._prune(layer, x)
        if layer == self.fused_after and self.positions is not None:
            x = self._restored(x, self.positions, tracks_parents=self.config.tracks_parents)
            self.positions = None
        return self._finish(x) if layer == self.last_layer else x

    def rotary_rows(self, layer: int, positions: Tensor | None, table: Tensor) -> Tensor:
        """Rows of a rotary table (patches, C) for the active tokens at positions (B, K) of the
        model, (B, 1, K, C); the table if all are active.

        Tables (heads, patches, C) give (B, heads, K, C).
        """
        if positions is None:
            return table
        if self.modules.spec.rotary_heads:
            return table[:, positions[:, self.num_prefix :] - self.num_prefix].transpose(0, 1)
        return rotary_at(table, positions, self.num_prefix, self.num_tokens)

    def log_sizes(self) -> Tensor | None:
        """The term of the attention logits of each active token, (B, K); None if there is none."""
        return attention_log_sizes(self.masks, self.strategy, self.positions)

    def pruning_map(self, device: torch.device) -> Tensor:
        """The number of blocks that each patch went through, as `to_map` gives it."""
        blocks = torch.full(
            (self.num_images, self.num_tokens - self.num_prefix), self.last_layer + 1, device=device
        )
        if self.record is not None:
            blocks = self.record.num_blocks(self.last_layer + 1)[:, self.num_prefix :]
        for layer, idx in self.pruned_idx:
            blocks = blocks.scatter(1, idx - self.num_prefix, torch.full_like(idx, layer + 1))
        return self.to_map(blocks)

    def merge_map(self, device: torch.device) -> Tensor:
        """The kept token that each patch merged into, as `to_map` gives it."""
        row_idx = self.row_idx
        if row_idx is None:  # nothing was pruned
            row_idx = torch.arange(self.num_tokens, device=device).repeat(self.num_images, 1)
        return self.to_map(row_idx[:, self.num_prefix :] - self.num_prefix)

    def to_map(self, patches: Tensor) -> Tensor:
        """Arrange values of all patches (B, patches) on their grid: (B, height, width), of a video
        (B, frames, height, width)."""
        rows, columns = self.require_grid()
        shape = (self.frames, rows // self.frames, columns) if self.is_video else (rows, columns)
        return patches.unflatten(1, shape)

    def require_grid(self) -> Grid:
        """Patches in height and width; ValueError if they are unknown, or patches are not where
        they were."""
        if self.modules.spec.refusal is not None:
            raise ValueError(
                f"cropr: maps of this model are not supported: {self.modules.spec.refusal}"
            )
        if self.grid is None:
            raise ValueError(
                f"cropr: cannot tell height and width of {self.num_tokens - self.num_prefix} "
                "patches"
            )
        return self.grid

    def choose_priorities(self, x: Tensor, masks: Masks | None) -> Priorities:
        """Priorities (B, N) of all tokens x (B, N, D) in every second module, None for none.

        Merging keeps the colors of a checkerboard in turn, except in images that have a mask, which
        keep it.
        """
        masked = None if masks is None else masks.priority
        if self.config.merge is None:
            return masked, masked
        grid = self.grid or (1, self.num_tokens - self.num_prefix)
        dark, light = checkerboard(x, grid, self.num_prefix)
        if masked is None:
            return dark, light
        has_mask = masked.any(1, keepdim=True)
        return torch.where(has_mask, masked, dark), torch.where(has_mask, masked, light)

    def _prune(self, layer: int, x: Tensor) -> Tensor:
        """Predict from the tokens x (B, N, D) if asked to, and keep as many as the schedule
        says."""
        module = self.modules.scorer(layer)
        scores = None
        if self.predicts:
            log_sizes = None if self.masks is None else self.masks.log_sizes(self.positions)
            prediction, scores = module.predict(x, log_sizes)
            if prediction is not None:
                self.aux.append(prediction)
        num_keep = self.counts[layer]
        if num_keep == x.shape[1]:
            return x
        if self.strategy is None:
            self.strategy = self._make_strategy(self.choose_priorities(x, self.masks))
        reduction = self.strategy.reduce(
            module, x, self.positions, num_keep, scores, self.keeps_pruned
        )
        self.positions = reduction.kept_idx
        self._record(layer, reduction)
        return reduction.kept

    def _make_strategy(self, priorities: Priorities) -> PruningStrategy:
        make = make_portable_strategy if self.portable else make_strategy
        return make(self.config, self.num_prefix, priorities, self.tracks_parents)

    def _record(self, layer: int, reduction: Reduction) -> None:
        """Note what maps, the fusion and the caller need of the pruned tokens."""
        self.pruned_idx.append((layer, reduction.pruned_idx))
        if reduction.offset is not None and reduction.parent_idx is not None:
            self.offsets.append(reduction.offset)
            self.parent_idx.append(reduction.parent_idx)
        if reduction.pruned is not None and self.keeps_pruned:
            self.pruned_tokens.append(reduction.pruned)
        if self.options.collect and self.row_idx is not None:
            self.collected_rows.append(self.row_idx)

    def full_map(self, x: Tensor) -> Tensor:
        """All tokens (B, N, D) at block output x (B, K, D): pruned ones with the change of their
        parents since."""
        return (
            x
            if self.positions is None
            else self._restored(x, self.positions, tracks_parents=bool(self.offsets))
        )

    def _restored(self, x: Tensor, positions: Tensor, *, tracks_parents: bool) -> Tensor:
        """Put the active tokens x (B, K, D) and the pruned ones at their positions."""
        pruned_idx = torch.cat([idx for _, idx in self.pruned_idx], 1)
        pruned = torch.cat(self.offsets if tracks_parents else self.pruned_tokens, 1)
        x = self.ops.restore(x, positions, pruned, pruned_idx)
        if tracks_parents:
            parent = torch.arange(x.shape[1], device=x.device).repeat(x.shape[0], 1)
            x = self.ops.add_parents(
                x, parent.scatter(1, pruned_idx, torch.cat(self.parent_idx, 1))
            )
        return x

    def _finish(self, x: Tensor) -> Tensor:
        """Arrange the tokens after the last block as the model takes them."""
        if self.options.collect:
            self.tokens = x
        row_idx = self.row_idx
        if self.options.restore:
            x = self.full_map(x)
            self.positions = None
        elif row_idx is not None and self.positions is not None and self.options.full:
            x = self.ops.gather(x, row_idx)
        return x


def attention_log_sizes(
    masks: Masks | None, strategy: PruningStrategy | None, positions: Tensor | None
) -> Tensor | None:
    """The term of the attention logits of tokens at `positions` (B, K), from padding or sizes, if
    any."""
    if masks is not None and masks.padding is not None:
        return masks.log_sizes(positions)
    return None if strategy is None or positions is None else strategy.log_sizes()


def _infer_grid(num_patches: int, embedded: Grid | None, configured: Grid) -> Grid | None:
    """Choose the grid that has num_patches patches: that of the embedding, if known, or of
    `apply`."""
    for grid in (embedded, configured):
        if grid is not None and grid[0] * grid[1] == num_patches:
            return grid
    return None
