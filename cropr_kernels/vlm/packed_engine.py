"""The engine inside towers that pack images: one residual buffer, in which no row ever moves.

    h = norm(x[rows]);  x[rows] += attention(h), h = norm(x[rows]);  x[rows] += mlp(h)

A group of S rows is one token of S D channels to selection and merging, so these are the engine's,
one image after the other. Blocks run one by one, so that a tower's loop may read x between two.
"""

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..models.norms import norm_parameters
from ..pruning.merging import Merge, log_sizes
from ..pruning.strategies import DropStrategy, MergeStrategy, PruningStrategy

ops = torch.ops.cropr


class PackedAttention(Protocol):
    """An attention within segments, with rotary positions over halves of the channels."""

    num_heads: int
    scaling: float
    qkv: nn.Module
    proj: nn.Module
    config: Any


class PackedBlock(Protocol):
    """A pre-norm block x + attn(norm1(x)), x + mlp(norm2(x)) over packed rows."""

    norm1: nn.Module
    norm2: nn.Module
    attn: PackedAttention
    mlp: nn.Module


class PackedRun:
    """The forward of one batch of images through the blocks of a tower, without gradients.

    Args:
        x: (T, D), the rows of all images; it changes in place.
        blocks: for which `runs_packed` is true.
        tables: cosines and sines (T, C).
        num_groups: of each image.
        queries: (modules, D), which score a group by its mean row.
        merge: groups merge; None: they are dropped.
        colors: (groups,) int8, of all images, if they merge.
    """

    def __init__(
        self,
        x: Tensor,
        blocks: Sequence[PackedBlock],
        tables: tuple[Tensor, Tensor],
        num_groups: list[int],
        queries: Tensor,
        merge: Merge | None,
        colors: Tensor | None,
    ):
        self.x = x.contiguous()
        self.blocks = blocks
        cos, sin = tables
        self.table = torch.cat([sin, cos], 1)
        self.group = len(x) // sum(num_groups)
        queries = queries.to(x.device, torch.float32)
        self.queries = queries.repeat(1, self.group) / self.group  # (modules, S D)
        groups = self.x.view(-1, self.group * x.shape[1])
        self.images = [part.unsqueeze(0) for part in groups.split(num_groups)]
        self.strategies: list[PruningStrategy] = []
        if merge is None or colors is None:
            self.strategies += [DropStrategy(0, (None, None), False) for _ in num_groups]
        else:
            parts = colors.to(x.device).unsqueeze(0).split(num_groups, 1)
            self.strategies += [MergeStrategy(merge, 0, (part, 1 - part), False) for part in parts]
        for strategy, image in zip(self.strategies, self.images):
            strategy.prepare_(image)
        self.active: list[Tensor | None] = [None] * len(num_groups)  # (1, K) groups, by image
        self.rows: Tensor | None = None  # (K S,) of x, ascending; None: all
        self.h: Tensor | None = None  # (1, K S, D), normalized for the next block

    @property
    def sizes(self) -> Tensor | None:
        """The sizes (K,) of the active groups; None: all are 1."""
        merging = [strategy for strategy in self.strategies if isinstance(strategy, MergeStrategy)]
        sizes = [strategy.sizes for strategy in merging if strategy.sizes is not None]
        return torch.cat(sizes, 1)[0] if sizes else None

    def step(self, layer: int, cu_seqlens: Tensor, counts: list[int] | None) -> Tensor:
        """Run a block on the active rows, in place.

        Args:
            layer: of the block.
            cu_seqlens: ends of the segments of all rows.
            counts: groups that stay of each image; None: all.

        Returns:
            x (T, D), complete at the active rows.
        """
        block = self.blocks[layer]
        x = self.x.unsqueeze(0)
        rows = None if self.rows is None else self.rows.unsqueeze(0)
        dtype = x.dtype
        if self.h is None:
            self.h = ops.gather_norm(x, rows, *norm_parameters(block.norm1, dtype))
        update = self._attend(block.attn, self.h, cu_seqlens)
        h = ops.add_norm_(x, rows, update, None, *norm_parameters(block.norm2, dtype))
        update = block.mlp(h[0]).unsqueeze(0)
        self.h = None
        if counts is not None:
            self._reduce(layer, update, counts)
        elif layer == len(self.blocks) - 1:
            ops.add_(x, rows, update, None)
        else:
            norm = norm_parameters(self.blocks[layer + 1].norm1, dtype)
            self.h = ops.add_norm_(x, rows, update, None, *norm)
        return self.x

    def marked(self) -> Tensor:
        """A copy of x (T, D) with NaN in place of pruned rows."""
        pruned = torch.ones(len(self.x), dtype=torch.bool, device=self.x.device)
        if self.rows is not None:
            pruned[self.rows] = False
        return self.x.masked_fill(pruned.unsqueeze(1), float("nan"))

    def _attend(self, attn: PackedAttention, h: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The attention of a block within segments, of h (1, K, D)."""
        ends = cu_seqlens.long()
        rows = None
        if self.rows is not None:
            rows = self.rows.unsqueeze(0)
            # Segments in which no row is left are gone
            ends = torch.searchsorted(self.rows, ends).unique_consecutive()
        heads = attn.qkv(h).unflatten(2, (3, attn.num_heads, -1))
        for part in range(2):
            ops.rotate_(heads[:, :, part], self.table, rows, 0, True)
        sizes = self.sizes
        bias = None if sizes is None else log_sizes(sizes).repeat_interleave(self.group)
        longest = int(ends.diff().max())
        output = ops.attend_segments(*heads[0].unbind(1), ends, longest, bias, attn.scaling)
        return attn.proj(output.flatten(1)).unsqueeze(0)

    def _reduce(self, layer: int, update: Tensor, counts: list[int]) -> None:
        """Add the update (1, K S, D) of the block's MLP, and keep `counts` groups of the images."""
        lengths = [
            image.shape[1] if idx is None else idx.shape[1]
            for image, idx in zip(self.images, self.active)
        ]
        updates = update.view(1, -1, self.images[0].shape[2]).split(lengths, 1)
        rows = []
        start = 0
        within = torch.arange(self.group, device=update.device)
        for index, (strategy, image, count) in enumerate(zip(self.strategies, self.images, counts)):
            query = self.queries[layer]
            idx = strategy.reduce_(image, self.active[index], updates[index], None, query, count)
            self.active[index] = idx
            rows.append(((start + idx[0]).unsqueeze(1) * self.group + within).flatten())
            start += image.shape[1]
        self.rows = torch.cat(rows)


@torch.no_grad()
def runs_packed(blocks: Sequence[nn.Module]) -> bool:
    """Tell whether a `PackedRun` equals these blocks: by names, and by a trial of the first on a
    few random rows."""
    first = blocks[0]
    if any(type(block) is not type(first) or "forward" in vars(block) for block in blocks):
        return False
    block = cast(PackedBlock, first)
    if {name for name, _ in first.named_children()} != {"norm1", "norm2", "attn", "mlp"}:
        return False
    attn = first.get_submodule("attn")
    if {name for name, _ in attn.named_children()} != {"qkv", "proj"}:
        return False
    if not all(hasattr(attn, name) for name in ("num_heads", "scaling", "config")):
        return False
    if block.attn.config._attn_implementation != "sdpa":
        return False
    weight = cast(Tensor, block.norm1.weight)
    if weight.is_meta or not weight.dtype.is_floating_point:
        return False
    width = len(weight)
    generator = torch.Generator().manual_seed(0)
    # Small rows, so that what a block adds to them is most of its output
    x = (0.01 * torch.randn(8, width, generator=generator)).to(weight)
    angles = torch.randn(8, width // block.attn.num_heads // 2, generator=generator).repeat(1, 2)
    tables = angles.cos().to(weight.device), angles.sin().to(weight.device)
    ends = torch.tensor([0, 5, 8], dtype=torch.int32, device=weight.device)
    try:
        expected = first(x, cu_seqlens=ends, position_embeddings=tables)
    except (TypeError, RuntimeError):  # it takes other arguments, or other tables
        return False
    queries = weight.new_zeros(0, width)
    run = PackedRun(x.clone(), [block], tables, [8], queries, None, None)
    error = (run.step(0, ends, None) - expected).abs().max()
    # Blocks compute norms and rotations in float32, whatever the dtype
    eps = max(torch.finfo(weight.dtype).eps, 8 * torch.finfo(torch.float32).eps)
    return bool(error <= 4 * eps * expected.abs().max())
