"""Ways to a full map for segmentation: the paper's alternatives to Last Layer Fusion."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cropr_kernels import ops
from cropr_kernels.models.vit import Block, ViTConfig
from cropr_kernels.pruning.model import require_pruned, run
from cropr_kernels.pruning.module import Scorer
from cropr_kernels.pruning.state import PruningOptions, PruningState
from cropr_kernels.tasks.features import token_norm
from cropr_kernels.tasks.segmentation import Segmenter

OTHER_FUSIONS = ("concat", "cross_attn", "cross_attn_concat", "mhsa_concat", "dtop")


class PrunedTokens(NamedTuple):
    """Tokens (B, R, D) as they were when pruned, their positions, and those of the kept tokens."""

    tokens: Tensor
    idx: Tensor
    kept_idx: Tensor


def collect_pruned(state: PruningState) -> PrunedTokens | None:
    """Collect the pruned tokens; None if no token was pruned."""
    if state.positions is None:
        return None
    tokens = torch.cat(state.pruned_tokens, 1)
    idx = torch.cat([idx for _, idx in state.pruned_idx], 1)
    return PrunedTokens(tokens, idx, state.positions)


class Confident(Scorer):
    """DToP's pruning: classify each token by itself, and prune those with the most confident
    result.

    Source: Tang et al. 2023, with the counts of a schedule in place of a threshold.
    """

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)

    def classify(self, x: Tensor) -> Tensor:
        """Logits (B, N, classes) of tokens (B, N, D)."""
        return self.head(self.norm(x))

    def query(self) -> Tensor:
        raise TypeError(
            "Confident: its scores are no product with a query; neither the engine nor merging "
            "can take it"
        )

    def predict(self, x: Tensor, log_sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, N, classes), with prefix, and scores (B, N), low for confident tokens."""
        logits = self.classify(x)
        return logits, -logits.detach().float().softmax(-1).amax(-1)

    def forward(
        self,
        x: Tensor,
        num_keep: int,
        num_prefix: int = 0,
        scores: Tensor | None = None,
        priority: Tensor | None = None,
    ) -> ops.Split:
        scores = self.predict(x)[1] if scores is None else scores
        return ops.split(x, scores, num_keep, num_prefix, priority)


class CrossAttention(nn.Module):
    """Learned queries, one per patch, attend to the active tokens; an MLP follows."""

    def __init__(self, dim: int, num_heads: int, patches: int):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(1, patches, dim))
        nn.init.trunc_normal_(self.queries, std=0.02)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, patches, D) from normed x (B, K, D)."""
        queries = self.queries.expand(len(x), -1, -1)
        out = queries + self.attention(self.norm(queries), x, x, need_weights=False)[0]
        return out + self.mlp(self.norm2(out))


class Fusion(nn.Module):
    """Kept and pruned tokens to features of all patches.

    concat: pruned tokens return to their positions as they were. mhsa_concat: one more block
    follows. cross_attn: learned queries attend to the kept tokens. cross_attn_concat: they attend
    to all tokens.
    """

    def __init__(self, fusion: str, dim: int, num_heads: int, patches: int):
        super().__init__()
        self.fusion = fusion
        self.reader = (
            CrossAttention(dim, num_heads, patches) if fusion.startswith("cross_attn") else None
        )
        self.block = (
            Block(ViTConfig(embed_dim=dim, num_heads=num_heads), 0.0)
            if fusion == "mhsa_concat"
            else None
        )

    def forward(
        self, x: Tensor, pruned: PrunedTokens | None, norm: nn.Module, num_prefix: int
    ) -> Tensor:
        """Normed features (B, patches, D) from x (B, K, D) after the last block."""
        if pruned is not None and self.fusion != "cross_attn":
            x = restore_rows(x, pruned, pruned.tokens)
        x = norm(x if self.block is None else self.block(x))
        return x[:, num_prefix:] if self.reader is None else self.reader(x)


def restore_rows(x: Tensor, pruned: PrunedTokens, rows: Tensor) -> Tensor:
    """Put rows of kept (B, K, C) and pruned tokens (B, R, C) in order of position."""
    return torch.ops.cropr.restore(x, pruned.kept_idx, rows, pruned.idx)


class FusedSegmenter(Segmenter):
    """`Segmenter` with another way to the full map.

    Args:
        backbone: pruned by `apply` with llf=False, num_queries = patches and num_outputs =
            num_classes.
        num_classes, grid, ignore_index: as in `Segmenter`.
        fusion: one of OTHER_FUSIONS; dtop replaces the Cropr modules.

    Raises:
        TypeError: the backbone is not pruned.
        ValueError: fusion is unknown, or the backbone has Last Layer Fusion.
    """

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        *,
        grid: tuple[int, int],
        fusion: str,
        ignore_index: int = 255,
    ):
        super().__init__(backbone, num_classes, grid=grid, ignore_index=ignore_index)
        if fusion not in OTHER_FUSIONS:
            raise ValueError(
                f"FusedSegmenter: fusion must be one of {', '.join(OTHER_FUSIONS)}, got {fusion!r}"
            )
        modules = require_pruned(backbone, "FusedSegmenter")
        if modules.config.llf:
            raise ValueError(
                "FusedSegmenter: the backbone must be pruned with llf=False, got llf=True"
            )
        dim = backbone.embed_dim
        num_heads = backbone.blocks[0].attn.num_heads
        self.fuse = None if fusion == "dtop" else Fusion(fusion, dim, num_heads, grid[0] * grid[1])
        if self.fuse is None:
            weight = next(backbone.parameters())
            for layer in range(len(modules)):
                modules[layer] = Confident(dim, num_classes).to(weight.device, weight.dtype)

    def logits(self, images: Tensor, *, predict: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Logits of all patches (B, patches, classes), and with `predict` those of every module."""
        backbone = self.backbone
        options = PruningOptions(predict=predict, collect=True)
        _, state = run(backbone, lambda: backbone.forward_features(images), options)
        x: Any = state.tokens
        pruned = collect_pruned(state)
        prefix = state.num_prefix
        norm = token_norm(backbone)
        if self.fuse is not None:
            return self.head(self.fuse(x, pruned, norm, prefix)), state.aux
        logits = self.head(norm(x))
        if pruned is not None:
            pruned_by_layer = zip(state.pruned_idx, state.pruned_tokens)
            early = torch.cat(
                [backbone.cropr[layer].classify(tokens) for (layer, _), tokens in pruned_by_layer],
                1,
            )
            logits = restore_rows(logits, pruned, early.type_as(logits))
        return logits[:, prefix:], predictions_of_patches(state)

    def aux_loss(self, prediction: Tensor, labels: Tensor) -> Tensor:
        """Segmentation loss of a prediction; for DToP of the tokens active at that layer."""
        if self.fuse is None:
            active = ~prediction[..., 0].isnan()
            labels = labels.where(active, self.ignore_index)
            prediction = prediction.masked_fill(~active.unsqueeze(-1), 0.0)
        return super().aux_loss(prediction, labels)


def predictions_of_patches(state: PruningState) -> list[Tensor]:
    """Spread DToP's predictions to (B, patches, classes), with NaN for tokens pruned before."""
    if not state.aux:
        return []
    pruned_after = dict(state.pruned_idx)
    predictions = []
    active = state.aux[0].new_ones(state.aux[0].shape[:2], dtype=torch.bool)
    for layer, prediction in enumerate(state.aux):
        full = prediction.new_full((*active.shape, prediction.shape[2]), float("nan"))
        full[active] = prediction.flatten(0, 1)
        predictions.append(full[:, state.num_prefix :])
        if layer in pruned_after:
            active = active.scatter(1, pruned_after[layer], False)
    return predictions
