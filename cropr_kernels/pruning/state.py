"""What travels with the tokens of one forward: positions, sizes, masks, pruned tokens, auxiliary predictions.

It belongs to that forward and to the thread that runs it, never to the model.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.blocks import rope_at
from ..ops.reference import cost_scales, size_adjusted_scores
from .masks import Masks, make_masks
from .merging import COST_WEIGHT, Merge, checkerboard, log_sizes


class PruningOptions(NamedTuple):
    """What a caller asks of one forward."""

    protect: Tensor | None = None  # (B, grid height, grid width) bool: patches kept while anything else can go
    padding: Tensor | None = None  # (B, grid height, grid width) bool: patches that are none
    predict: bool | None = None  # compute auxiliary predictions; None: in training
    observe: Callable[[int, Tensor], None] | None = None  # called after every block with its tokens; nothing is pruned
    collect: bool = False  # keep the pruned tokens, and those after the last block
    engine: bool = False  # the engine may run the blocks: the caller looks at nothing between them
    whole: bool = True  # where tokens merged, copy each to all positions that it stands for


class Slot:
    """The forward under way on one model."""

    def __init__(self) -> None:
        self.options: PruningOptions | None = None  # of the forward under way, or about to begin
        self.model: Any = None  # and its Cropr modules: a replica's own where there are several
        self.stack: Any = None
        self.grid: tuple[int, int] | None = None  # patches in height and width of the images just embedded
        self.state: PruningState | None = None
        self.padding: Tensor | None = None  # (B, K), of the tokens that the last norm is about to see

    def clear(self) -> None:
        self.options = self.model = self.stack = self.state = self.padding = None


class Slots(threading.local):
    """A slot of every thread's own."""

    def __init__(self) -> None:
        self.own = Slot()

    def __reduce__(self) -> tuple[type["Slots"], tuple[()]]:
        return Slots, ()


class PruningState:
    """One batch on its way through the blocks; ValueError where a mask, the schedule or windows do not fit it.

    Args:
        stack: the Cropr modules, with their `config` and `spec`.
        x: (B, N, D), the tokens that enter the first block.
        options: what the caller asks.
        grid: patches in height and width, where the embedding told.
    """

    def __init__(self, stack: Any, x: Tensor, options: PruningOptions, grid: tuple[int, int] | None):
        config, spec = stack.config, stack.spec
        prefix, depth = spec.num_prefix, len(spec.blocks)
        patches = x.shape[1] - prefix
        grids = [one for one in (grid, config.grid) if one is not None and one[0] * one[1] == patches]
        self.grid = grids[0] if grids else None
        self.stack, self.config, self.options, self.last = stack, config, options, depth - 1
        self.fused_after = depth - 1 - config.whole_blocks if config.llf else depth  # the block before the fusion
        self.counts = config.counts(x.shape[1], depth, prefix)
        self.windows, self.num_images, self.dropped_prefix = config.windows, x.shape[0], 0
        self.masks = make_masks(options.protect, options.padding, x.shape[0], patches, prefix)
        if self.windows is not None:
            if self.grid is None:
                raise ValueError(f"cropr: cannot tell height and width of {patches} patches, which windows need")
            if self.masks is not None:
                rows = self.windows.split(self.masks.priority[:, prefix:].unsqueeze(-1), self.grid)
                self.masks = Masks(rows.squeeze(-1), None)
            self.dropped_prefix, prefix = prefix, 0
        self.num_prefix, self.num_tokens = prefix, x.shape[1] if self.windows is None else self.windows.size**2
        self.priorities: tuple[Tensor | None, Tensor | None] = None, None  # (B, N), by position, in turns
        self.next_layer = 0
        self.done = False  # the engine has run all blocks
        self.positions: Tensor | None = None  # (B, K), of the active tokens; None: all, in order
        self.sizes: Tensor | None = None  # (B, K) float32, where tokens merge
        self.rows: Tensor | None = None  # (B, N), where tokens merged: the row of those kept in which each token is
        self.aux: list[Tensor] = []
        self.pruned_idx: list[tuple[int, Tensor]] = []  # layer, and the positions (B, R) pruned after it
        self.pruned_tokens: list[Tensor] = []  # (B, R, D), as they were pruned
        self.offsets: list[Tensor] = []  # (B, R, D), of these from their hosts, and where the hosts are (B, R)
        self.parent_idx: list[Tensor] = []
        self.tokens: Tensor | None = None  # after the last block, where they are collected

    @property
    def predicts(self) -> bool:
        return self.stack.training if self.options.predict is None else self.options.predict

    def before_block(self, layer: int, x: Tensor) -> Tensor:
        """The tokens as a block shall see them: with windows its own, or all of an image."""
        windows = self.windows
        if layer == 0 and windows is not None and self.grid is not None:
            x = windows.split(x[:, self.dropped_prefix :], self.grid)
        if windows is not None and layer in windows.global_blocks:
            x = x.reshape(self.num_images, -1, x.shape[2])
        return x

    def after_block(self, layer: int, x: Tensor) -> Tensor:
        """The tokens that are kept of those a block gave; all of them again where the fusion follows."""
        windows = self.windows
        if windows is not None and layer in windows.global_blocks:
            x = x.reshape(self.num_images * windows.count(self.grid or (0, 0)), -1, x.shape[2])
        if layer < len(self.counts):
            x = self._prune(layer, x)
        if layer == self.fused_after and self.positions is not None:
            x = self._restore(x, self.positions)
        return self._finish(x) if layer == self.last else x

    def rotary_rows(self, layer: int, table: Tensor) -> Tensor:
        """Rows of a rotary table (patches, C) for the active tokens: (B, 1, K, C), or the table where all are."""
        windows = self.windows
        if windows is None:
            return table if self.positions is None else rope_at(table, self.positions, self.num_prefix)
        rows = windows.rope(table, self.grid or (0, 0), self.num_images)
        rows = rows.unsqueeze(1) if self.positions is None else rope_at(rows, self.positions, 0)
        return rows.reshape(self.num_images, 1, -1, rows.shape[-1]) if layer in windows.global_blocks else rows

    def log_sizes(self) -> Tensor | None:
        """What attention adds to the logits of each active token, (B, K); None where that is nothing."""
        if self.masks is not None and self.masks.padding is not None:
            return self.masks.log_sizes(self.positions)
        return None if self.sizes is None else log_sizes(self.sizes)

    def pruning_map(self, device: torch.device) -> Tensor:
        """(B, grid height, grid width) int64: the number of blocks each patch went through."""
        windows, grid = self.windows, self.require_grid()
        rows = self.num_images * (1 if windows is None else windows.count(grid))
        blocks = torch.full((rows, self.num_tokens - self.num_prefix), self.last + 1, device=device)
        for layer, idx in self.pruned_idx:
            blocks = blocks.scatter(1, idx - self.num_prefix, torch.full_like(idx, layer + 1))
        if windows is not None:
            blocks = windows.join(blocks.unsqueeze(-1), grid).squeeze(-1)
        return blocks.unflatten(1, grid)

    def require_grid(self) -> tuple[int, int]:
        """Patches in height and width; ValueError where they are unknown, or patches are not in their places."""
        if self.stack.spec.refusal is not None:
            raise ValueError(f"cropr: maps of this model are not supported: {self.stack.spec.refusal}")
        if self.grid is None:
            raise ValueError(f"cropr: cannot tell height and width of {self.num_tokens - self.num_prefix} patches")
        return self.grid

    def choose_priorities(self, x: Tensor, masked: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Priorities (B, N) of all tokens x (B, N, D) in every second module, None for none.

        Where tokens merge those of a colour; but images that a mask says something about have those of it, `masked`.
        """
        if self.config.merge is None:
            return masked, masked
        grid = self.grid or (1, self.num_tokens - self.num_prefix)
        colours = checkerboard(x, grid if self.windows is None else (self.windows.size,) * 2, self.num_prefix)
        if masked is None:
            return colours
        told = masked.any(1, keepdim=True)
        return torch.where(told, masked, colours[0]), torch.where(told, masked, colours[1])

    def _prune(self, layer: int, x: Tensor) -> Tensor:
        module, count, prefix = self.stack[layer], self.counts[layer], self.num_prefix
        prediction, scores = None, None
        if self.predicts:
            absent = None if self.masks is None else self.masks.log_sizes(self.positions)
            prediction, scores = module.predict(x, absent)
        if prediction is not None:
            self.aux.append(prediction)
        if count == x.shape[1]:
            return x
        before = self.positions
        if before is None:
            self.priorities = self.choose_priorities(x, None if self.masks is None else self.masks.priority)
        priority = self.priorities[len(self.pruned_idx) % 2]
        if priority is not None and before is not None:
            priority = priority.gather(1, before)
        by_host, all_tokens = self.config.llf is not None and self.config.llf.by_host, x
        collects = self.options.collect or (self.config.llf is not None and not by_host)
        if self.config.merge is None:
            x, kept_idx, pruned, pruned_idx = module(x, count, prefix, scores, priority)
            if by_host:
                offset, parent_idx = torch.ops.cropr.parent_offsets(all_tokens, kept_idx, pruned_idx, prefix)
        else:
            x, kept_idx, pruned_idx, rows = self._merge(self.config.merge, x, module, count, scores, priority)
            if by_host or collects:
                pruned = torch.ops.cropr.gather(all_tokens, pruned_idx)
            if by_host:
                offset, parent_idx = pruned - torch.ops.cropr.gather(x, rows), kept_idx.gather(1, rows)
        if before is not None:
            kept_idx, pruned_idx = before.gather(1, kept_idx), before.gather(1, pruned_idx)
        self.positions = kept_idx
        self.pruned_idx.append((layer, pruned_idx))
        if collects:
            self.pruned_tokens.append(pruned)
        if by_host:
            self.offsets.append(offset)
            self.parent_idx.append(parent_idx if before is None else before.gather(1, parent_idx))
        return x

    def _restore(self, x: Tensor, positions: Tensor) -> Tensor:
        """All tokens at their positions, of those that are active (B, K, D) and those that were pruned."""
        by_host, pruned_idx = bool(self.offsets), torch.cat([idx for _, idx in self.pruned_idx], 1)
        pruned = torch.cat(self.offsets if by_host else self.pruned_tokens, 1)
        x = torch.ops.cropr.restore(x, positions, pruned, pruned_idx)
        if by_host:
            parent = torch.arange(x.shape[1], device=x.device).repeat(x.shape[0], 1)
            x = torch.ops.cropr.add_parents(x, parent.scatter(1, pruned_idx, torch.cat(self.parent_idx, 1)))
        self.positions = self.sizes = None
        return x

    def _merge(
        self, merge: Merge, x: Tensor, module: Any, count: int, scores: Tensor | None, priority: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens kept, positions kept and pruned, and the row of the kept that each of the pruned went into."""
        prefix = self.num_prefix
        before = scores = torch.ops.cropr.scores(x, module.query()) if scores is None else scores
        if self.sizes is None:
            self.sizes = x.new_ones(x.shape[:2], dtype=torch.float32)
        else:
            scores = size_adjusted_scores(scores, self.sizes, merge.size_weight, prefix)
        split = torch.ops.cropr.select(scores, merge.num_safe(x.shape[1], count, prefix), prefix, priority)
        costs = cost_scales(before, scores, COST_WEIGHT, prefix)
        x, kept_idx, pruned_idx, self.sizes, dest = torch.ops.cropr.merge(
            x, *split, self.sizes, count, num_prefix=prefix, cost_scale=costs
        )
        self.rows = dest if self.rows is None else dest.gather(1, self.rows)
        return x, kept_idx, pruned_idx, dest.gather(1, pruned_idx)

    def _finish(self, x: Tensor) -> Tensor:
        """What the model shall see of the tokens after the last block."""
        if self.options.collect:
            self.tokens = x
        if self.rows is not None and self.positions is not None and self.options.whole:
            x = torch.ops.cropr.gather(x, self.rows)
        if self.windows is not None:
            grid = self.require_grid()
            x, self.aux = self.windows.join(x, grid), [self.windows.join(one, grid) for one in self.aux]
        return x
