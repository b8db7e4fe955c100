"""Semantic segmentation: a linear decoder over the whole map, one query per patch in every module (paper, section 4.2).

Last Layer Fusion brings the pruned tokens back before the last block. The other ways to a whole map that the paper
compares it with are `Fusion` and `Confident`.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.vit import Block, ViTConfig
from ..pruning.model import Pruned
from ..pruning.module import Split
from ..pruning.state import Left, Streamed
from .features import patch_features, token_norm

FUSIONS = ("llf", "concat", "cross_attn", "cross_attn_concat", "mhsa_concat", "dtop")


class PatchLogits(NamedTuple):
    """Logits of all patches (B, patches, classes): the decoder's, and those of the modules."""

    output: Tensor
    aux: list[Tensor]


def pixel_loss(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Mean cross-entropy of logits (B, classes, ...) over the places of target (B, ...) that have a class.

    0 where none has.
    """
    total = F.cross_entropy(logits.float(), target, ignore_index=ignore_index, reduction="sum")
    return total / (target != ignore_index).sum().clamp_min(1)


def patch_labels(target: Tensor, grid: tuple[int, int]) -> Tensor:
    """Label maps (B, H, W) at the centre of every patch of a grid: (B, patches) int64."""
    return F.interpolate(target[:, None].float(), size=grid, mode="nearest-exact")[:, 0].long().flatten(1)


class Confident(nn.Module):
    """DToP's pruning: each token is classified by itself, and the surest leave with the prediction they have.

    Source: Tang et al. 2023, with the counts of a schedule in place of a threshold.
    """

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)

    def classify(self, x: Tensor) -> Tensor:
        """Logits (B, N, classes) of tokens (B, N, D)."""
        return self.head(self.norm(x))

    def predict(self, x: Tensor, log_sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, N, classes), prefix included, and scores (B, N): the surer, the lower."""
        logits = self.classify(x)
        return logits, -logits.detach().float().softmax(-1).amax(-1)

    def forward(
        self,
        x: Tensor,
        num_keep: int,
        num_prefix: int = 0,
        scores: Tensor | None = None,
        priority: Tensor | None = None,
    ) -> Split:
        scores = self.predict(x)[1] if scores is None else scores
        return Split(*torch.ops.cropr.split(x, scores, num_keep, num_prefix, priority))


class CrossAttention(nn.Module):
    """Learned queries, one per patch, read the tokens that are there, and an MLP follows."""

    def __init__(self, dim: int, num_heads: int, patches: int):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(1, patches, dim))
        nn.init.trunc_normal_(self.queries, std=0.02)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, patches, D) from x (B, K, D), normalised."""
        queries = self.queries.expand(len(x), -1, -1)
        out = queries + self.attention(self.norm(queries), x, x, need_weights=False)[0]
        return out + self.mlp(self.norm2(out))


class Fusion(nn.Module):
    """From the tokens that stayed and those that left to all patches, without Last Layer Fusion.

    concat: those that left, as they were, take their places again. mhsa_concat: a further block follows. cross_attn:
    learned queries read those that stayed. cross_attn_concat: they read all.
    """

    def __init__(self, how: str, dim: int, num_heads: int, patches: int):
        super().__init__()
        self.how = how
        self.reader = CrossAttention(dim, num_heads, patches) if how.startswith("cross_attn") else None
        self.block = Block(ViTConfig(embed_dim=dim, num_heads=num_heads), 0.0) if how == "mhsa_concat" else None

    def forward(self, streamed: Streamed, norm: Any, num_prefix: int) -> Tensor:
        """Normalised features (B, patches, D)."""
        x = streamed.tokens
        if self.how != "cross_attn":
            x = put_back(x, streamed.left)
        x = norm(x if self.block is None else self.block(x))
        return x[:, num_prefix:] if self.reader is None else self.reader(x)


def put_back(x: Tensor, left: Left | None, pruned: Tensor | None = None) -> Tensor:
    """Rows of tokens that stayed, and of those that left (or `pruned` in their place), in order of position."""
    if left is None:
        return x
    return torch.ops.cropr.restore(x, left.kept_idx, left.tokens if pruned is None else pruned, left.idx)


class Segmenter(nn.Module):
    """A backbone without a head, a linear decoder with bilinear upsampling, and their losses.

    Args:
        backbone: pruned by `apply` with num_queries = patches and num_outputs = num_classes, or not pruned.
        num_classes: classes of the label maps.
        grid: patches in height and width at the training size.
        fusion: one of FUSIONS; "llf" if apply was given llf=True, or nothing is pruned. dtop replaces the Cropr
            modules.
        ignore_index: label of the pixels that count nowhere.

    Raises:
        ValueError: fusion is unknown, or does not fit the backbone's llf.
    """

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        *,
        grid: tuple[int, int],
        fusion: str = "llf",
        ignore_index: int = 255,
    ):
        super().__init__()
        if fusion not in FUSIONS:
            raise ValueError(f"Segmenter: fusion must be one of {', '.join(FUSIONS)}, got {fusion!r}")
        pruned = isinstance(backbone, Pruned)
        if pruned and backbone.cropr.llf != (fusion == "llf"):
            raise ValueError(f"Segmenter: fusion={fusion!r} needs apply(..., llf={fusion == 'llf'})")
        self.backbone, self.grid, self.fusion, self.ignore_index = backbone, grid, fusion, ignore_index
        dim = backbone.embed_dim
        self.head = nn.Linear(dim, num_classes)
        self.fuse: Fusion | None = None
        if pruned and fusion == "dtop":
            for i in range(len(backbone.cropr)):
                backbone.cropr[i] = Confident(dim, num_classes).to(next(backbone.parameters()).device)
        elif pruned and fusion != "llf":
            self.fuse = Fusion(fusion, dim, backbone.blocks[0].attn.num_heads, grid[0] * grid[1])

    def logits(self, images: Tensor, *, predict: bool = False) -> PatchLogits:
        """Logits of all patches (B, patches, classes), and with `predict` those of every module."""
        backbone: Any = self.backbone
        prefix = backbone.num_prefix_tokens
        if self.fusion == "llf" or not isinstance(backbone, Pruned):
            tokens, aux = patch_features(backbone, images, predict=predict)
            return PatchLogits(self.head(tokens), aux)
        gone: list[Tensor] = []
        streamed = backbone.cropr_stream(
            images, departures=lambda _, positions: gone.append(positions), predict=predict, collect=True
        )
        if self.fuse is not None:
            return PatchLogits(self.head(self.fuse(streamed, token_norm(backbone), prefix)), streamed.aux)
        logits = self.head(token_norm(backbone)(streamed.tokens))
        if streamed.left is not None:
            parts = streamed.left.tokens.split([positions.shape[1] for positions in gone], 1)
            active: list[Any] = [module for module, count in zip(backbone.cropr, self._drops(streamed)) if count]
            leaving = torch.cat([module.classify(part) for module, part in zip(active, parts)], 1)
            logits = put_back(logits, streamed.left, leaving.type_as(logits))
        return PatchLogits(logits[:, prefix:], self._to_patches(streamed.aux, gone, prefix))

    def _drops(self, streamed: Streamed) -> list[int]:
        stack = self.backbone.cropr
        left = streamed.left
        before = streamed.tokens.shape[1] + (0 if left is None else left.idx.shape[1])
        counts = stack.schedule(before, len(self.backbone.blocks), self.backbone.num_prefix_tokens, stack.llf)
        return [a - b for a, b in zip([before, *counts], counts)]

    def _to_patches(self, aux: list[Tensor], gone: list[Tensor], prefix: int) -> list[Tensor]:
        """DToP's predictions of the tokens alive as (B, patches, classes); NaN where a token had left before."""
        if not aux:
            return []
        batch, count, classes = aux[0].shape
        alive = torch.ones(batch, count, dtype=torch.bool, device=aux[0].device)
        whole, departures = [], list(gone)
        for prediction in aux:
            everywhere = prediction.new_full((batch, count, classes), float("nan"))
            everywhere[alive] = prediction.flatten(0, 1)
            whole.append(everywhere[:, prefix:])
            if departures:
                alive = alive.scatter(1, departures.pop(0), False)
        return whole

    def to_map(self, logits: Tensor, images: Tensor) -> Tensor:
        """Patch logits (B, patches, classes), bilinear, as a map of the images' size (B, classes, H, W)."""
        sides = self.backbone.patch_embed.patch_size
        grid = images.shape[2] // sides[0], images.shape[3] // sides[1]
        low = logits.transpose(1, 2).unflatten(2, grid).float()
        return F.interpolate(low, size=images.shape[2:], mode="bilinear", align_corners=False)

    def forward(self, images: Tensor, target: Tensor | None = None) -> Any:
        """Losses {"main", "aux"} in training with a target (B, H, W) int64, else logits (B, classes, H, W)."""
        if not self.training or target is None:
            return self.to_map(self.logits(images).output, images)
        logits, aux = self.logits(images, predict=True)
        main = pixel_loss(self.to_map(logits, images), target, self.ignore_index)
        total = main.new_zeros(())
        labels = patch_labels(target, self.grid) if aux else target
        for prediction in aux:
            present = labels
            if self.fusion == "dtop":
                known = ~prediction[..., 0].isnan()
                present = labels.where(known, self.ignore_index)
                prediction = prediction.masked_fill(~known.unsqueeze(-1), 0.0)
            total = total + pixel_loss(prediction.transpose(1, 2), present, self.ignore_index)
        return {"main": main, "aux": total}

    def predictions(self, images: Tensor) -> list[Tensor]:
        """Label logits (B, patches, classes) of every auxiliary head, in order, and of the decoder last."""
        logits, aux = self.logits(images, predict=isinstance(self.backbone, Pruned))
        return [*aux, logits]

    def slide(self, images: Tensor, size: tuple[int, int], stride: tuple[int, int]) -> Tensor:
        """Logits (B, classes, H, W) of images of any size, averaged over windows of the training size.

        Images smaller than a window are padded with zeros.

        Raises:
            ValueError: windows so far apart would leave gaps.
        """
        if not all(1 <= step <= side for step, side in zip(stride, size)):
            raise ValueError(f"Segmenter.slide: stride must be from 1 to the window's size {size}, got {stride}")
        height, width = images.shape[2:]
        padded = F.pad(images, (0, max(size[1] - width, 0), 0, max(size[0] - height, 0)))
        total = padded.new_zeros(len(images), self.head.out_features, *padded.shape[2:], dtype=torch.float32)
        count = total.new_zeros(padded.shape[2:])
        for top in _starts(padded.shape[2], size[0], stride[0]):
            for left in _starts(padded.shape[3], size[1], stride[1]):
                window = ..., slice(top, top + size[0]), slice(left, left + size[1])
                total[window] += self(padded[window])
                count[window] += 1
        return (total / count)[:, :, :height, :width]


def _starts(length: int, size: int, stride: int) -> list[int]:
    """Where windows begin, so that they cover everything and the last one ends at the edge."""
    return [*range(0, max(length - size, 0), stride), length - size]
