"""Per-forward state of blocks over maps (B, height, width, D): every window keeps equally many
tokens.

Tokens are selected window by window, in groups of windows of one shape: those at the edges of the
map hold fewer, and lose none until the others hold as few. All else is as for tokens (B, N, D).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.adapters import MapBlock
from ..models.tiling import AttentionRows, Tiling, WindowGroup
from .module import Scorer
from .state import Grid, PruningModules, PruningOptions, PruningState
from .strategies import Priorities, PruningStrategy, Reduction


class _Windows:
    """The active tokens of windows of one shape, as rows of a batch."""

    strategy: PruningStrategy | None = None

    def __init__(self, group: WindowGroup):
        self.group = group
        self.length = group.num_patches  # K, of a window
        self.positions: Tensor | None = None  # (rows, K) in their windows; None: all

    @property
    def num_tokens(self) -> int:
        """Active tokens of an image in these windows."""
        return len(self.group.cells) * self.length

    def log_sizes(self) -> Tensor | None:
        """The term of the attention logits of each token, (rows, K), if they differ."""
        return None if self.strategy is None else self.strategy.log_sizes()

    def reduce(self, module: Scorer, x: Tensor, num_keep: int, keep_pruned: bool) -> Reduction:
        """Keep num_keep tokens of each row of x (rows, K, D); positions are those in windows."""
        if num_keep == self.length or self.strategy is None:
            none = x.new_zeros(len(x), 0, dtype=torch.long)
            tokens = x[:, :0]
            return Reduction(x, self._all_positions(x), none, tokens, tokens, none)
        reduction = self.strategy.reduce(module, x, self.positions, num_keep, None, keep_pruned)
        self.positions = reduction.kept_idx
        self.length = num_keep
        return reduction

    def _all_positions(self, x: Tensor) -> Tensor:
        if self.positions is not None:
            return self.positions
        return torch.arange(self.length, device=x.device).repeat(len(x), 1)

    def on_map(self, positions: Tensor) -> Tensor:
        """The positions (B, ...) on the map of tokens at positions (rows, K) in their windows."""
        cells = self.group.cells
        images = positions.unflatten(0, (-1, len(cells)))
        return cells.expand(len(images), -1, -1).gather(2, images).flatten(1)

    def token_rows(self, num_images: int) -> Tensor:
        """The row among the kept tokens of an image in these windows that each token merged into,
        (B, tokens)."""
        cells = self.group.cells
        row_idx = None if self.strategy is None else self.strategy.row_idx
        if row_idx is None:
            row_idx = torch.arange(cells.shape[1], device=cells.device).expand(
                num_images * len(cells), -1
            )
        starts = torch.arange(len(cells), device=cells.device) * self.length
        return (row_idx.unflatten(0, (-1, len(cells))) + starts[:, None]).flatten(1)


class MapState(PruningState):
    """One batch of maps on its way through the blocks, as `PruningState`.

    Active tokens are in the order of `Tiling`, with the positions of the map.
    """

    def __init__(
        self,
        modules: PruningModules,
        x: Tensor,
        options: PruningOptions,
        grid: Grid | None,
        frames: int | None = None,
    ):
        super().__init__(modules, x, options, grid, frames)
        self.tiling = Tiling(self.require_grid(), modules.spec.window, x.device)
        self.windows = [_Windows(group) for group in self.tiling.groups]

    def rows(self, block: MapBlock) -> list[AttentionRows]:
        """The active tokens that attend to each other in a block."""
        if not block.window and self.positions is not None:
            rows = self.tiling.map_rows(self.positions)
            return [rows._replace(log_sizes=self.log_sizes())]
        return [
            self.tiling.window_rows(windows.group, windows.positions)._replace(
                log_sizes=windows.log_sizes()
            )
            for windows in self.windows
        ]

    def log_sizes(self) -> Tensor | None:
        terms = [windows.log_sizes() for windows in self.windows]
        if all(term is None for term in terms):
            return None
        zeros = (
            torch.zeros(self.num_images, windows.num_tokens, device=self.tiling.order.device)
            for windows in self.windows
        )
        return torch.cat(
            [
                zero if term is None else term.reshape(self.num_images, -1)
                for term, zero in zip(terms, zeros)
            ],
            1,
        )

    @property
    def row_idx(self) -> Tensor | None:
        if all(
            windows.strategy is None or windows.strategy.row_idx is None for windows in self.windows
        ):
            return None
        rows = []
        start = 0
        for windows in self.windows:
            rows.append(windows.token_rows(self.num_images) + start)
            start += windows.num_tokens
        return torch.cat(rows, 1)[:, self.tiling.order.argsort()]

    def _prune(self, layer: int, x: Tensor) -> Tensor:
        num_keep = self.counts[layer]
        if all(windows.length <= num_keep for windows in self.windows):
            return x
        if self.positions is None:
            self._start(self.choose_priorities(x, self.masks))
            x = x[:, self.tiling.order]
        module = self.modules.scorer(layer)
        reductions: list[Reduction] = []
        parts = x.split([windows.num_tokens for windows in self.windows], 1)
        for windows, part in zip(self.windows, parts):
            tokens = part.reshape(-1, windows.length, x.shape[2])
            count = min(num_keep, windows.length)
            reductions.append(windows.reduce(module, tokens, count, self.keeps_pruned))
        reduction = self._joined(reductions)
        self.positions = reduction.kept_idx
        self._record(layer, reduction)
        return reduction.kept

    def _start(self, priorities: Priorities) -> None:
        """Make the strategies of all windows, with priorities (B, N) of the map."""
        for windows in self.windows:
            cells = windows.group.cells
            first, second = (
                None if values is None else values[:, cells].flatten(0, 1) for values in priorities
            )
            windows.strategy = self._make_strategy((first, second))

    def _joined(self, reductions: Sequence[Reduction]) -> Reduction:
        """The reduction of all windows of an image, with positions on the map."""
        pruned = [reduction.pruned for reduction in reductions if reduction.pruned is not None]
        offsets = [reduction.offset for reduction in reductions if reduction.offset is not None]
        parents = [
            reduction.parent_idx for reduction in reductions if reduction.parent_idx is not None
        ]
        count = len(reductions)
        return Reduction(
            self._cat_tokens([reduction.kept for reduction in reductions]),
            self._cat_positions([reduction.kept_idx for reduction in reductions]),
            self._cat_positions([reduction.pruned_idx for reduction in reductions]),
            self._cat_tokens(pruned) if len(pruned) == count else None,
            self._cat_tokens(offsets) if len(offsets) == count else None,
            self._cat_positions(parents) if len(parents) == count else None,
        )

    def _cat_tokens(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.reshape(self.num_images, -1, part.shape[2]) for part in parts], 1)

    def _cat_positions(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([windows.on_map(part) for windows, part in zip(self.windows, parts)], 1)
