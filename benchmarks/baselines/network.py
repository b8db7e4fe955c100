"""The reference ViT with any way of reducing tokens in it: one interface, so that all run on the same network.

A `Reducer` says where in a block it acts and what it needs beside the tokens. One that needs the probabilities of the
attention makes the block compute them; blocks of all others keep SDPA.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cropr_kernels.models.blocks import project_heads, proportional_attention, rope_at
from cropr_kernels.models.vit import ViT, rotate

ops = torch.ops.cropr
Need = Literal["attention", "class row", "keys", "values", "patches", "update"]
_PADDING = 1e-30  # what a size of 0 is taken for, so that its logarithm is finite; the weight is 0 all the same


class Context(NamedTuple):
    """What a reducer sees of a block beside its tokens (B, N, D): what it asked for, else None."""

    attention: Tensor | None = None  # (B, H, N, N), after the softmax
    class_row: Tensor | None = None  # (B, H, N), its first row
    keys: Tensor | None = None  # (B, H, N, C)
    values: Tensor | None = None  # (B, H, N, C)
    patches: Tensor | None = None  # what `Reducer.prepare` made of the input
    positions: Tensor | None = None  # (B, N): where in the image tokens are; None: where they are in the list
    sizes: Tensor | None = None  # (B, N) float32: how many tokens each stands for, 0 for padding; None: one
    log_sizes: Tensor | None = None  # (B, N) float32, where attention weighs tokens by their sizes
    active: Tensor | None = None  # (B, N) of 0 and 1, with gradient, where training masks tokens and drops none
    update: Tensor | None = None  # (B, N, D): what the MLP adds to the tokens
    depth: float = 0.0  # of all blocks, the share that comes before this one

    def need(self, name: str) -> Tensor:
        """What a reducer asked for.

        Raises:
            ValueError: it did not say in `needs` that it needs it.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"a reducer looks at {name}, and does not declare it in its needs")
        return value


class Reduction(NamedTuple):
    """What is left of the tokens."""

    tokens: Tensor  # (B, K, D)
    idx: Tensor | None = None  # (B, K): the rows they were, where they are not mixed
    pruned: tuple[Tensor, Tensor] | None = None  # pruned tokens (B, N - K, D) and their rows, where asked for
    weights: Tensor | None = None  # (B, K - P, N - P): what patch tokens were mixed by, where that is at hand
    sizes: Tensor | None = None  # (B, K), as in Context
    active: Tensor | None = None  # (B, N), as in Context
    loss: Tensor | None = None  # to be added to that of the network
    rows: Callable[[], Tensor] | None = None  # for who asks: (B, N), the row in which each token is; None: not all are
    places: Tensor | None = None  # (B, K): the rows whose places they take, where they are mixed and that is known


class Features(NamedTuple):
    """What leaves the last block, normalised, and what training needs of the way there."""

    tokens: Tensor
    losses: list[Tensor]
    active: Tensor | None
    rows: Sequence[Callable[[], Tensor] | None] = ()  # of every reduction

    def whole(self) -> Tensor | None:
        """A copy of each token at all positions that it stands for, (B, N0, D); None where tokens are dropped."""
        at: Tensor | None = None
        for rows in self.rows:
            if rows is None:
                return None
            at = rows() if at is None else rows().gather(1, at)
        return self.tokens if at is None else take(self.tokens, at)


class Reducer(nn.Module, ABC):
    """Reduces tokens x (B, N, D) to num_keep; the first num_prefix stay as they are, and stay first."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    # behind the block, between its attention and MLP, or before the attention, which then has fewer queries
    place: ClassVar[Literal["block", "attention", "queries"]] = "block"
    proportional = True  # whether later attention weighs tokens by their sizes, to the power of
    size_exponent = 1.0

    def prepare(self, patches: Tensor) -> Tensor:
        """What "patches" shall be, made of the input (B, N0 - P, pixels) once, by the first reducer for all layers."""
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


Make = Callable[[int, int, int], Reducer]  # width D, patches kept, and all there were -> one layer's reducer


class Reduced(nn.Module):
    """A plain ViT that loses tokens: counts[l] are kept after block l.

    Args:
        backbone: the reference ViT; it is not copied.
        make: makes the reducer of a layer. Layers that prune nothing have none.
        counts: as from `cropr.Schedule`.
        llf: Last Layer Fusion: pruned tokens are restored before the last block, as they were.

    Raises:
        TypeError: another backbone.
        ValueError: the way of reducing needs a class token and there is none, or cannot do LLF.
    """

    def __init__(self, backbone: Any, make: Make, counts: Sequence[int], *, llf: bool = False):
        super().__init__()
        if not isinstance(backbone, ViT):
            raise TypeError(f"Reduced: the backbone must be the reference ViT, got {type(backbone).__name__}")
        self.backbone, self.counts, self.llf = backbone, list(counts), llf
        prefix = backbone.num_prefix_tokens
        before = [prefix + backbone.grid**2, *counts]
        self.reducers = nn.ModuleDict()
        for layer, count in enumerate(counts):
            if count == before[layer]:
                continue
            reducer = make(backbone.embed_dim, count - prefix, backbone.grid**2)
            name = type(reducer).__name__
            if "class row" in reducer.needs and not backbone.config.class_token:
                raise ValueError(f"{name} needs a class token, and the model has none")
            if llf and not isinstance(reducer, Selector):
                raise ValueError(f"{name} mixes tokens: they cannot come back for Last Layer Fusion")
            if isinstance(reducer, Selector):
                reducer.returns_pruned = llf
            self.reducers[str(layer)] = reducer

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.backbone.forward_head(self.run(images).tokens)

    def run(self, images: Tensor) -> Features:
        """All tokens kept after the last block."""
        backbone: Any = self.backbone
        x, table = backbone.embed(images)
        rope, prefix, losses = table, backbone.num_prefix_tokens, []
        pruned: list[tuple[Tensor, Tensor]] = []
        rows: list[Callable[[], Tensor] | None] = []
        reducers: Any = dict(self.reducers.items())
        users = [reducer for reducer in reducers.values() if "patches" in reducer.needs]
        side = backbone.config.patch_size
        context = Context(patches=users[0].prepare(patches_of(images, side)) if users else None)
        for layer, block in enumerate(backbone.blocks):
            if pruned and layer == len(backbone.blocks) - 1:
                x = ops.restore(x, context.positions, *(torch.cat(parts, 1) for parts in zip(*pruned)))
                rope, context, rows = table, Context(), []
            reducer = reducers.get(str(layer))
            if reducer is None and context.log_sizes is None and context.active is None:
                x = block(x, rope=rope)
                continue
            context = context._replace(depth=layer / len(backbone.blocks))
            x, reduction = run_block(block, x, rope, prefix, context, reducer, self.counts[layer] if reducer else 0)
            if reduction is None:
                continue
            rows.append(reduction.rows)
            losses += [] if reduction.loss is None else [reduction.loss]
            if reduction.idx is None and table is not None:
                raise ValueError(f"{type(reducer).__name__} mixes tokens: they have no rotary positions")
            before, positions = context.positions, reduction.places if reduction.idx is None else reduction.idx
            if before is not None:
                positions = before if positions is None else before.gather(1, positions)
            if reduction.pruned is not None:
                tokens, idx = reduction.pruned
                pruned.append((tokens, idx if before is None else before.gather(1, idx)))
            if table is not None:
                rope = rope_at(table, positions, prefix)
            sizes = reduction.sizes
            logarithms = None
            if sizes is not None and reducer.proportional:
                logarithms = sizes.clamp_min(_PADDING).log() * reducer.size_exponent
            context = context._replace(positions=positions, sizes=sizes, log_sizes=logarithms, active=reduction.active)
        return Features(backbone.norm(x), losses, context.active, rows)


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
    """One block, its attention decomposed, with a reducer at its place in it."""
    q, k, v = project_heads(block.attn, block.norm1(x))
    if rope is not None:
        q, k = rotate(q, rope, num_prefix), rotate(k, rope, num_prefix)
    needs = frozenset() if reducer is None else reducer.needs
    reduction = None
    attention = attention_of(q, k, context) if "attention" in needs or context.active is not None else None
    if reducer is not None:
        row = attention_of(q[:, :, :1], k, context)[:, :, 0] if "class row" in needs else None
        context = context._replace(
            attention=attention,
            class_row=row,
            keys=k if "keys" in needs else None,
            values=v if "values" in needs else None,
        )
        if reducer.place == "queries":
            reduction = reducer(x, context, num_keep, num_prefix)
            x = reduction.tokens
            if reduction.idx is None:
                raise ValueError(f"{type(reducer).__name__} acts before the attention, and mixes tokens")
            q = take(q.transpose(1, 2).flatten(2), reduction.idx).unflatten(2, (q.shape[1], -1)).transpose(1, 2)
    heads = proportional_attention(q, k, v, context.log_sizes) if attention is None else attention.type_as(v) @ v
    x = x + block.drop_path1(block.ls1(block.attn.proj(heads.transpose(1, 2).flatten(2))))
    if reducer is not None and reducer.place == "attention":
        reduction = reducer(x, context, num_keep, num_prefix)
        x = reduction.tokens
    update = block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    x = x + update
    if reducer is not None and reducer.place == "block":
        context = context._replace(update=update if "update" in needs else None)
        reduction = reducer(x, context, num_keep, num_prefix)
        x = reduction.tokens
    return x, reduction


def take(x: Tensor, idx: Tensor) -> Tensor:
    """Rows of x (B, N, C) at idx (B, K), which may repeat: `cropr::gather`'s gradient is for rows that do not."""
    return x.gather(1, idx.unsqueeze(-1).expand(-1, -1, x.shape[2])) if x.requires_grad else ops.gather(x, idx)


def attention_of(q: Tensor, k: Tensor, context: Context) -> Tensor:
    """Probabilities (B, H, queries, N), float32: what SDPA hands to nobody.

    Masked tokens attend to themselves and to active ones, and nobody attends to them (DynamicViT, section 3.2).
    """
    logits = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).float()
    if context.log_sizes is not None:
        logits = logits + context.log_sizes[:, None, None]
    if context.active is None:
        return logits.softmax(-1)
    seen = context.active[:, None, None] + (1 - context.active[:, None, :, None]) * torch.eye(
        k.shape[2], device=k.device
    )
    mass = (logits - logits.amax(-1, keepdim=True)).exp() * seen.clamp_max(1)
    return mass / mass.sum(-1, keepdim=True)
