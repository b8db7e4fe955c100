"""Per-forward state of models with windows: every window keeps equally many tokens.

Tokens are selected window by window, in groups of windows of one shape: those at the edges of the
map hold fewer, and lose none until the others hold as few. All else is as for tokens (B, N, D).
Windows are those of blocks over maps (B, height, width, D), or those that `apply` gives to others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.adapters import MapBlock
from ..models.tiling import AttentionRows, Tiling, WindowGroup
from .masks import Masks
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

    def reduce(
        self, module: Scorer, x: Tensor, num_keep: int, scores: Tensor | None, keep_pruned: bool
    ) -> Reduction:
        """Keep at most num_keep tokens of each row of x (rows, K, D); positions are those in
        windows."""
        if num_keep >= self.length or self.strategy is None:
            no_positions = x.new_zeros(len(x), 0, dtype=torch.long)
            no_tokens = x[:, :0]
            return Reduction(
                x, self._all_positions(x), no_positions, no_tokens, no_tokens, no_positions
            )
        reduction = self.strategy.reduce(module, x, self.positions, num_keep, scores, keep_pruned)
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


class WindowedState(PruningState):
    """One batch on its way through blocks with windows, as `PruningState`.

    Active tokens are in the order of `Tiling`, and all tokens, if none is pruned, in that of the
    map. There is no prefix.

    Raises:
        ValueError: a mask, the schedule or windows do not fit the batch.
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
        spec = modules.spec
        depth = len(spec.blocks)
        if self.grid is None:
            num_patches = self.num_tokens - self.num_prefix
            raise ValueError(
                f"cropr: cannot tell height and width of {num_patches} patches, which windows need"
            )
        if self.config.windows is not None:
            self.config.windows.require_multiple(self.grid)
        window = spec.window if self.config.windows is None else self.config.windows.size
        self.tiling = Tiling(self.grid, window, x.device)
        self.windows = [_Windows(group) for group in self.tiling.groups]
        self.num_scheduled = max(group.num_patches for group in self.tiling.groups)
        self.counts = self.config.counts(self.num_scheduled, depth, 0)
        if self.masks is not None:
            self.masks = Masks(self.masks.priority[:, self.num_prefix :], None)
        self.num_tokens -= self.num_prefix
        self.num_prefix = 0

    def before_block(self, layer: int, x: Tensor) -> Tensor:
        """Arrange tokens for a block that takes no maps: those of a window or an image in a row."""
        windows = self.config.windows
        if windows is None:
            return x
        if layer == 0:
            x = x[:, self.modules.spec.num_prefix :]
        if layer in windows.global_blocks:
            return x
        if self.positions is None:
            x = x[:, self.tiling.order]
        return x.reshape(self._num_rows, -1, x.shape[2])

    def after_block(self, layer: int, x: Tensor) -> Tensor:
        windows = self.config.windows
        if windows is not None and layer not in windows.global_blocks:
            x = x.reshape(self.num_images, -1, x.shape[2])
            if self.positions is None:
                x = self._on_map(x)
        if self.options.observe is not None:
            self.options.observe(layer, x)
            return x
        return super().after_block(layer, x)

    @property
    def _num_rows(self) -> int:
        """Windows of a batch, all of one shape."""
        return self.num_images * len(self.windows[0].group.cells)

    def _on_map(self, x: Tensor) -> Tensor:
        """Arrange all tokens (B, N, ...) in the order of the map."""
        return x[:, self.tiling.order.argsort()]

    def rotary_rows(self, layer: int, positions: Tensor | None, table: Tensor) -> Tensor:
        windows = self.config.windows
        if windows is None or layer in windows.global_blocks:
            return super().rotary_rows(layer, positions, table)
        if positions is None:
            positions = self.tiling.order.expand(self.num_images, -1)
        rows = super().rotary_rows(layer, positions, table)
        return rows.reshape(self._num_rows, 1, -1, rows.shape[3])

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
        if self.positions is None or all(term is None for term in terms):
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
        return self._on_map(torch.cat(rows, 1))

    def _prune(self, layer: int, x: Tensor) -> Tensor:
        module = self.modules.scorer(layer)
        num_keep = self.counts[layer]
        prunes = any(windows.length > num_keep for windows in self.windows)
        if not prunes and self.config.windows is None:
            return x
        arranged = x[:, self.tiling.order] if self.positions is None else x
        parts = arranged.split([windows.num_tokens for windows in self.windows], 1)
        rows = [
            part.reshape(-1, windows.length, x.shape[2])
            for windows, part in zip(self.windows, parts)
        ]
        scores = self._predict(module, rows[0]) if self.config.windows is not None else None
        if not prunes:
            return x
        if self.positions is None:
            self._start(self.choose_priorities(x, self.masks))
        reduction = self._joined(
            [
                windows.reduce(module, tokens, num_keep, scores, self.keeps_pruned)
                for windows, tokens in zip(self.windows, rows)
            ]
        )
        self.positions = reduction.kept_idx
        self._record(layer, reduction)
        return reduction.kept

    def _predict(self, module: Scorer, x: Tensor) -> Tensor | None:
        """Predict from the tokens x (rows, K, D) of windows, if asked to, and return their scores
        if they fall out of it."""
        if not self.predicts:
            return None
        prediction, scores = module.predict(x)
        if prediction is not None:
            prediction = prediction.reshape(self.num_images, self.num_tokens, -1)
            self.aux.append(self._on_map(prediction))
        return scores

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
