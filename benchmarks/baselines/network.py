"""The reference ViT with any token reduction in it, behind one interface.

A `Reducer` declares where in a block it acts and what it needs besides the tokens. A reducer that
needs the attention probabilities makes the block compute them; the blocks of all others keep SDPA.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cropr_kernels.models.blocks import project_heads, proportional_attention
from cropr_kernels.models.rotary import rope_at
from cropr_kernels.models.vit import ViT, rotate

ops = torch.ops.cropr
Requirement = Literal["attention", "class row", "keys", "values", "patches", "update"]
# Replaces a size of 0, so that its logarithm is finite; the attention weight is 0 all the same
_PADDING_SIZE = 1e-30


class Context(NamedTuple):
    """Inputs of a reducer besides the tokens (B, N, D); None if it does not declare them."""

    attention: Tensor | None = None  # (B, H, N, N), after the softmax
    class_row: Tensor | None = None  # (B, H, N), its first row
    keys: Tensor | None = None  # (B, H, N, C)
    values: Tensor | None = None  # (B, H, N, C)
    patches: Tensor | None = None  # the result of `Reducer.prepare`
    positions: Tensor | None = None  # (B, N), in the image; None: as in the sequence
    # (B, N) float32: number of tokens merged into each, 0 for padding; None: one each
    sizes: Tensor | None = None
    log_sizes: Tensor | None = None  # (B, N) float32, if attention weighs tokens by their sizes
    # (B, N) of 0 and 1, with gradient, if training masks tokens and drops none
    active: Tensor | None = None
    update: Tensor | None = None  # (B, N, D), added to the tokens by the MLP
    depth: float = 0.0  # share of all blocks that comes before this one

    def require(self, name: str) -> Tensor:
        """Return a field of the context.

        Raises:
            ValueError: the reducer does not declare it in `needs`.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"a reducer looks at {name}, and does not declare it in its needs")
        return value


class Reduction(NamedTuple):
    """Tokens after a reduction."""

    tokens: Tensor  # (B, K, D)
    idx: Tensor | None = None  # (B, K): their input rows, if tokens are not mixed
    # Pruned tokens (B, N - K, D) and their rows, if requested
    pruned: tuple[Tensor, Tensor] | None = None
    weights: Tensor | None = None  # (B, K - P, N - P) that mixed the patch tokens, if known
    sizes: Tensor | None = None  # (B, K), as in Context
    active: Tensor | None = None  # (B, N), as in Context
    loss: Tensor | None = None  # added to the loss of the network
    # Lazy (B, N): the output row of each token; None: some have none
    rows: Callable[[], Tensor] | None = None
    # (B, K): the input rows whose positions mixed tokens take, if known
    position_idx: Tensor | None = None


class Features(NamedTuple):
    """Normed tokens after the last block, and the losses and masks that training needs."""

    tokens: Tensor
    losses: list[Tensor]
    active: Tensor | None
    rows: Sequence[Callable[[], Tensor] | None] = ()  # of every reduction

    def full(self) -> Tensor | None:
        """Copy tokens to all positions merged into them: (B, N0, D), None if some are dropped."""
        row_idx: Tensor | None = None
        for rows in self.rows:
            if rows is None:
                return None
            row_idx = rows() if row_idx is None else rows().gather(1, row_idx)
        return self.tokens if row_idx is None else gather_rows(self.tokens, row_idx)


class Reducer(nn.Module, ABC):
    """Reduces tokens x (B, N, D) to num_keep; the first num_prefix stay unchanged and first."""

    needs: ClassVar[frozenset[Requirement]] = frozenset()
    # after the block, between its attention and MLP, or before the attention, which then has fewer
    # queries
    insertion_point: ClassVar[Literal["block", "attention", "queries"]] = "block"
    proportional = True  # later attention weighs tokens by their sizes
    size_exponent = 1.0  # to this power

    def prepare(self, patches: Tensor) -> Tensor:
        """Derive "patches" from the input (B, N0 - P, pixels), once for all layers."""
        return patches

    @abstractmethod
    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction: ...


class Selector(Reducer):
    """Keeps the tokens with the highest scores, as they are."""

    returns_pruned = False

    @abstractmethod
    def scores(self, x: Tensor, context: Context, num_prefix: int) -> Tensor:
        """(B, N); those of prefix tokens do not matter."""

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        scores = self.scores(x, context, num_prefix).detach().float()
        if self.returns_pruned:
            kept, kept_idx, pruned, pruned_idx = ops.split(x, scores, num_keep, num_prefix)
            return Reduction(kept, kept_idx, (pruned, pruned_idx))
        kept_idx, _ = ops.select(scores, num_keep, num_prefix)
        return Reduction(ops.gather(x, kept_idx), kept_idx)


# Width D, patches kept, all patches -> the reducer of one layer
Make = Callable[[int, int, int], Reducer]


class Reduced(nn.Module):
    """A plain ViT whose tokens are reduced to counts[l] after block l.

    Args:
        backbone: the reference ViT; not copied.
        make: factory of the reducer of a layer. Layers that prune nothing have no reducer.
        counts: kept tokens after each block, as from `cropr.Schedule`.
        llf: Last Layer Fusion: pruned tokens are restored before the last block, as they were.

    Raises:
        TypeError: the backbone is not the reference ViT.
        ValueError: the reducer needs a class token and the model has none, or it cannot do Last
            Layer Fusion.
    """

    def __init__(self, backbone: Any, make: Make, counts: Sequence[int], *, llf: bool = False):
        super().__init__()
        if not isinstance(backbone, ViT):
            raise TypeError(
                f"Reduced: the backbone must be the reference ViT, got {type(backbone).__name__}"
            )
        self.backbone = backbone
        self.counts = list(counts)
        self.llf = llf
        prefix = backbone.num_prefix_tokens
        counts_before = [prefix + backbone.grid**2, *counts]
        self.reducers = nn.ModuleDict()
        for layer, count in enumerate(counts):
            if count == counts_before[layer]:
                continue
            reducer = make(backbone.embed_dim, count - prefix, backbone.grid**2)
            name = type(reducer).__name__
            if "class row" in reducer.needs and not backbone.config.class_token:
                raise ValueError(f"{name} needs a class token, and the model has none")
            if llf and not isinstance(reducer, Selector):
                raise ValueError(
                    f"{name} mixes tokens: they cannot come back for Last Layer Fusion"
                )
            if isinstance(reducer, Selector):
                reducer.returns_pruned = llf
            self.reducers[str(layer)] = reducer

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.backbone.forward_head(self.run(images).tokens)

    def run(self, images: Tensor) -> Features:
        """Run the blocks, and return the tokens kept after the last one."""
        backbone: Any = self.backbone
        x, table = backbone.embed(images)
        rope = table
        prefix = backbone.num_prefix_tokens
        losses: list[Tensor] = []
        pruned: list[tuple[Tensor, Tensor]] = []
        rows: list[Callable[[], Tensor] | None] = []
        reducers: Any = dict(self.reducers.items())
        patch_users = [reducer for reducer in reducers.values() if "patches" in reducer.needs]
        side = backbone.config.patch_size
        context = Context(
            patches=patch_users[0].prepare(patches_of(images, side)) if patch_users else None
        )
        for layer, block in enumerate(backbone.blocks):
            if pruned and layer == len(backbone.blocks) - 1:
                x = ops.restore(
                    x, context.positions, *(torch.cat(parts, 1) for parts in zip(*pruned))
                )
                rope = table
                context = Context()
                rows = []
            reducer = reducers.get(str(layer))
            if reducer is None and context.log_sizes is None and context.active is None:
                x = block(x, rope=rope)
                continue
            context = context._replace(depth=layer / len(backbone.blocks))
            x, reduction = run_block(
                block, x, rope, prefix, context, reducer, self.counts[layer] if reducer else 0
            )
            if reduction is None:
                continue
            rows.append(reduction.rows)
            if reduction.loss is not None:
                losses.append(reduction.loss)
            if reduction.idx is None and table is not None:
                raise ValueError(
                    f"{type(reducer).__name__} mixes tokens: they have no rotary positions"
                )
            if reduction.pruned is not None:
                tokens, idx = reduction.pruned
                pruned.append((tokens, positions_at(context.positions, idx)))
            context = advance(context, reducer, reduction)
            if table is not None:
                rope = rope_at(table, context.positions, prefix)
        return Features(backbone.norm(x), losses, context.active, rows)


def positions_at(positions: Tensor | None, idx: Tensor | None) -> Any:
    """Image positions of the rows at idx (B, K).

    Positions None: rows are positions. idx None: all rows stay.
    """
    if positions is None or idx is None:
        return idx if positions is None else positions
    return positions.gather(1, idx)


def advance(context: Context, reducer: Reducer, reduction: Reduction) -> Context:
    """Return the context of the next block."""
    sizes = reduction.sizes
    log_sizes = None
    if sizes is not None and reducer.proportional:
        log_sizes = sizes.clamp_min(_PADDING_SIZE).log() * reducer.size_exponent
    positions = positions_at(
        context.positions, reduction.position_idx if reduction.idx is None else reduction.idx
    )
    return context._replace(
        positions=positions, sizes=sizes, log_sizes=log_sizes, active=reduction.active
    )


def patches_of(images: Tensor, side: int) -> Tensor:
    """Images (B, C, H, W) as patches (B, patches, C * side * side)."""
    return nn.functional.unfold(images, side, stride=side).transpose(1, 2)


def run_block(
    block: Any,
    x: Tensor,
    rope: Tensor | None,
    num_prefix: int,
    context: Context,
    reducer: Reducer | None,
    num_keep: int,
) -> tuple[Tensor, Reduction | None]:
    """Run one block, its attention decomposed, with a reducer at its insertion point."""
    q, k, v = project_heads(block.attn, block.norm1(x))
    if rope is not None:
        q, k = rotate(q, rope, num_prefix), rotate(k, rope, num_prefix)
    needs = frozenset() if reducer is None else reducer.needs
    reduction = None
    attention = (
        attention_of(q, k, context) if "attention" in needs or context.active is not None else None
    )
    if reducer is not None:
        row = attention_of(q[:, :, :1], k, context)[:, :, 0] if "class row" in needs else None
        context = context._replace(
            attention=attention,
            class_row=row,
            keys=k if "keys" in needs else None,
            values=v if "values" in needs else None,
        )
        if reducer.insertion_point == "queries":
            reduction = reducer(x, context, num_keep, num_prefix)
            x = reduction.tokens
            if reduction.idx is None:
                raise ValueError(
                    f"{type(reducer).__name__} acts before the attention, and mixes tokens"
                )
            q = (
                gather_rows(q.transpose(1, 2).flatten(2), reduction.idx)
                .unflatten(2, (q.shape[1], -1))
                .transpose(1, 2)
            )
    heads = (
        proportional_attention(q, k, v, context.log_sizes)
        if attention is None
        else attention.type_as(v) @ v
    )
    x = x + block.drop_path1(block.ls1(block.attn.proj(heads.transpose(1, 2).flatten(2))))
    if reducer is not None and reducer.insertion_point == "attention":
        reduction = reducer(x, context, num_keep, num_prefix)
        x = reduction.tokens
    update = block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    x = x + update
    if reducer is not None and reducer.insertion_point == "block":
        context = context._replace(update=update if "update" in needs else None)
        reduction = reducer(x, context, num_keep, num_prefix)
        x = reduction.tokens
    return x, reduction


def gather_rows(x: Tensor, idx: Tensor) -> Tensor:
    """Rows of x (B, N, C) at idx (B, K); idx may repeat, unlike for `cropr::gather`'s gradient."""
    return (
        x.gather(1, idx.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        if x.requires_grad
        else ops.gather(x, idx)
    )


def attention_of(q: Tensor, k: Tensor, context: Context) -> Tensor:
    """Attention probabilities (B, H, queries, N), float32, which SDPA does not return.

    Masked tokens attend to themselves and to active ones; no other token attends to them
    (DynamicViT, section 3.2).
    """
    logits = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).float()
    if context.log_sizes is not None:
        logits = logits + context.log_sizes[:, None, None]
    if context.active is None:
        return logits.softmax(-1)
    itself = torch.eye(k.shape[2], device=k.device)
    mask = context.active[:, None, None] + (1 - context.active[:, None, :, None]) * itself
    mass = (logits - logits.amax(-1, keepdim=True)).exp() * mask.clamp_max(1)
    return mass / mass.sum(-1, keepdim=True)
