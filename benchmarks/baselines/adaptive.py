"""Methods that let each image lose its own number of tokens, image by image on the reference ViT.

An `AdaptiveReducer` decides by itself how many tokens an image loses. `ImageByImage` finds what it
needs for that on calibration photos, block after block in the reduced network, and counts FLOPs.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.baselines.matching import ATM, after_prefix, merge_matched, sizes_of
from benchmarks.baselines.network import (
    Context,
    Features,
    Reducer,
    Reduction,
    advance,
    run_block,
)
from cropr_kernels.models.vit import ViT
from cropr_kernels.pruning.costs import matrix_elements

SMALLEST_SALIENCE = 1e-6  # so that two tokens of salience 0 have a mean


class AdaptiveReducer(Reducer):
    """Reduces the tokens of one image x (1, N, D) to a number that the image decides; num_keep does
    not matter."""

    @abstractmethod
    def statistics(self, x: Tensor, context: Context, num_prefix: int) -> Tensor:
        """(S,), the values of an image that `fit` reads."""

    @abstractmethod
    def fit(self, images: Sequence[Tensor], rate: float) -> None:
        """Prepare for tokens like those of the calibration photos.

        Args:
            images: statistics of each photo at this place of the reduced network.
            rate: the higher, the more tokens go.
        """


class AdaptiveATM(AdaptiveReducer):
    """`ATM` with a threshold a layer: every token whose best pair loses at most so much merges.

    Source: Lee and Choi 2025 (arXiv 2505.15160), whose thresholds of similarity depend on the
    layer. Ours, as the paper's formula was not at hand: a layer's threshold lets R tokens go on
    average over the calibration photos, and holds for the loss that chooses the pairs, sizes
    included.
    """

    needs = ATM.needs
    insertion_point = ATM.insertion_point

    def __init__(self, matching: ATM | None = None):
        super().__init__()
        self.matching = ATM() if matching is None else matching
        self.threshold = 0.0

    def statistics(self, x: Tensor, context: Context, num_prefix: int) -> Tensor:
        return -self.matching.pairs(x, context, num_prefix).gain.amax(2)[0]

    def fit(self, images: Sequence[Tensor], rate: float) -> None:
        self.threshold = lowest(images, rate)

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        source_idx, target_idx, gain = self.matching.pairs(x, context, num_prefix)
        count = int((-gain.amax(2) <= self.threshold).sum())
        prefix = after_prefix(source_idx[:, :0], num_prefix)
        return merge_matched(x, context, prefix, source_idx, target_idx, gain, count)


class AdaMerge(AdaptiveReducer):
    """Merge patches of the first half of the sequence into those of the second, before each block.

    The affinity of patches is their product, its softmax taken over each row; a patch's salience is
    its column's sum, scaled to [0, 1] over the image. The pairs with the highest salience of the
    source times cosine merge, into means weighted by salience. With S the mean over sources of
    their best weighted similarity, an image loses floor(r_max sigmoid((S - mu) / sigma)) tokens, mu
    and sigma the mean and deviation of S over calibration photos at that layer; r_max is twice the
    rate. Source: Lee, Go and Choi 2026 (arXiv 2605.27465), equations 1 to 6, alpha = T = 1. The
    authors refine mu and sigma in passes over the photos; layer after layer, each in the network
    reduced before it, gives the fixed point at once. Where the paper is silent we took what had the
    least divergence on other photos: tokens are normed by the block's first norm (0.15 in place of
    0.29), and attention weighs them by sizes (0.29 in place of 0.34).

    Args:
        norm: of the block that follows.
    """

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm
        self.rate = 0.0
        self.mean = 0.0
        self.deviation = 1.0

    def statistics(self, x: Tensor, context: Context, num_prefix: int) -> Tensor:
        return self.weighted_similarity(x, num_prefix)[0].amax(2).mean(1)

    def fit(self, images: Sequence[Tensor], rate: float) -> None:
        self.rate = rate
        values = torch.cat(list(images))
        self.mean = values.mean().item()
        self.deviation = values.std().item()

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        similarity, salience = self.weighted_similarity(x, num_prefix)
        z = (similarity.amax(2).mean() - self.mean) / self.deviation
        count = min(int((2 * self.rate * z.sigmoid()).floor()), similarity.shape[1])
        patches = after_prefix(
            torch.arange(x.shape[1] - num_prefix, device=x.device).expand(len(x), -1), num_prefix
        )
        prefix, sources, targets = patches.split(
            [num_prefix, similarity.shape[1], similarity.shape[2]], 1
        )
        by_salience = context._replace(sizes=salience)
        merged = merge_matched(x, by_salience, prefix, sources, targets, similarity, count)
        if merged.rows is None or merged.sizes is None:
            raise RuntimeError("AdaMerge: merged tokens have neither rows nor sizes")
        sizes = torch.zeros_like(merged.sizes)
        return merged._replace(sizes=sizes.scatter_add(1, merged.rows(), sizes_of(x, context)))

    def weighted_similarity(self, x: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
        """Salience times cosine (B, A, C) of sources and targets, and the salience (B, N)."""
        patches = self.norm(x)[:, num_prefix:].float()
        salience = (patches @ patches.transpose(1, 2)).softmax(2).sum(1)
        low, high = salience.aminmax(dim=1, keepdim=True)
        salience = ((salience - low) / (high - low)).nan_to_num().clamp_min(SMALLEST_SALIENCE)
        half = patches.shape[1] // 2
        unit = torch.nn.functional.normalize(patches, dim=2)
        cosine = unit[:, :half] @ unit[:, half:].transpose(1, 2)
        ones = salience.new_ones(len(x), num_prefix)
        return salience[:, :half, None] * cosine, torch.cat([ones, salience], 1)


class ThresholdDrop(AdaptiveReducer):
    """Drop the patches whose Cropr score is at most a threshold of the layer.

    The threshold lets R tokens go on average over the calibration photos. A patch stays.

    Args:
        query: (D,), of the Cropr module.
    """

    def __init__(self, query: Tensor):
        super().__init__()
        self.query = query
        self.threshold = -torch.inf

    def statistics(self, x: Tensor, context: Context, num_prefix: int) -> Tensor:
        return torch.ops.cropr.scores(x, self.query)[0, num_prefix:]

    def fit(self, images: Sequence[Tensor], rate: float) -> None:
        self.threshold = lowest(images, rate)

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        scores = torch.ops.cropr.scores(x, self.query)
        count = int((scores[0, num_prefix:] <= self.threshold).sum())
        num_keep = max(x.shape[1] - count, num_prefix + 1)
        kept_idx, _ = torch.ops.cropr.select(scores, num_keep, num_prefix)
        return Reduction(torch.ops.cropr.gather(x, kept_idx), kept_idx)


def lowest(images: Sequence[Tensor], count: float) -> float:
    """The value below or at which each of the images (S,) has `count` values on average."""
    values = torch.cat(list(images)).sort().values
    total = min(round(count * len(images)), len(values))
    return values[total - 1].item() if total > 0 else -torch.inf


class Image(NamedTuple):
    """One image between two blocks."""

    x: Tensor  # (1, N, D)
    context: Context
    flops: float  # saved so far
    features: Features  # its rows


class ImageByImage:
    """The reference ViT, in which every image has its own number of tokens.

    Args:
        backbone: the reference ViT, without rotary positions.
        reducers: one a block or less, from the first block on; None: none.
        counts: kept tokens after each block, prefix included, of reducers that are not adaptive.
        before: reducers act before the block, in place of their insertion point.
    """

    def __init__(
        self,
        backbone: ViT,
        reducers: Sequence[Reducer | None],
        counts: Sequence[int],
        *,
        before: bool = False,
    ):
        missing = len(backbone.blocks) - len(reducers)
        self.backbone: Any = backbone
        self.reducers = [*reducers, *[None] * missing]
        self.counts = [*counts, *[0] * (len(backbone.blocks) - len(counts))]
        self.before = before
        block: Any = backbone.blocks[0]
        self.dim = backbone.embed_dim
        self.attention_weights = matrix_elements(block.attn)
        self.query_weights = block.attn.qkv.weight.numel()
        self.mlp_weights = matrix_elements(block.mlp)

    def fit(self, images: Tensor, rate: float) -> None:
        """Prepare the adaptive reducers, if any, on calibration photos (images, C, H, W)."""
        if not any(isinstance(reducer, AdaptiveReducer) for reducer in self.reducers):
            return
        states = self.start(images)
        for layer, reducer in enumerate(self.reducers):
            if isinstance(reducer, AdaptiveReducer):
                recorder = Recorder(reducer)
                for state in states:
                    self.step(state, layer, recorder)
                reducer.fit(recorder.values, rate)
            states = [self.step(state, layer, reducer) for state in states]

    def __call__(self, images: Tensor) -> tuple[Tensor, list[Tensor | None], Tensor]:
        """Logits (B, classes); the tokens (1, N, D) of each image at all positions, None where some
        are dropped; FLOPs that each image saves, (B,) float64."""
        logits, tokens, saved = [], [], []
        for state in self.start(images):
            for layer, reducer in enumerate(self.reducers):
                state = self.step(state, layer, reducer)
            x = self.backbone.norm(state.x)
            logits.append(self.backbone.forward_head(x))
            tokens.append(state.features._replace(tokens=x).full())
            saved.append(state.flops)
        return torch.cat(logits), tokens, torch.tensor(saved, dtype=torch.float64)

    def start(self, images: Tensor) -> list[Image]:
        """The images before the first block."""
        embedded = [self.backbone.embed(image.unsqueeze(0))[0] for image in images]
        return [Image(x, Context(), 0.0, Features(x, [], None)) for x in embedded]

    def step(self, image: Image, layer: int, reducer: Reducer | None) -> Image:
        """Run one block, and reduce the tokens in it or before it."""
        x, context, flops, features = image
        context = context._replace(depth=layer / len(self.reducers))
        prefix = self.backbone.num_prefix_tokens
        num_keep = self.counts[layer] or x.shape[1]
        reduction = None
        inside = None if self.before else reducer
        if self.before and reducer is not None:
            reduction = reducer(x, context, num_keep, prefix)
            x = reduction.tokens
            context = advance(context, reducer, reduction)
        before = x.shape[1]
        x, reduced = run_block(
            self.backbone.blocks[layer], x, None, prefix, context, inside, num_keep
        )
        if inside is not None and reduced is not None:
            reduction = reduced
            context = advance(context, inside, reduced)
        flops += self.saved(before, x.shape[1], inside)
        if reduction is not None:
            features = features._replace(rows=[*features.rows, reduction.rows])
        return Image(x, context, flops, features)

    def saved(self, before: int, after: int, reducer: Reducer | None) -> float:
        """FLOPs that a block saves which reads `before` tokens and returns `after`."""
        full = self.backbone.num_prefix_tokens + self.backbone.grid**2
        place = "block" if reducer is None else reducer.insertion_point
        queries = after if place == "queries" else before
        mlp = before if place == "block" else after
        projected = self.query_weights * before
        projected += (self.attention_weights - self.query_weights) * queries
        linear = self.attention_weights * full - projected + self.mlp_weights * (full - mlp)
        return 2 * linear + 4 * self.dim * (full**2 - before * queries)


class Recorder(Reducer):
    """Notes the statistics of an adaptive reducer; the rest of the block, which nobody reads, sees
    one token."""

    def __init__(self, reducer: AdaptiveReducer):
        super().__init__()
        self.needs = reducer.needs  # type: ignore[misc]
        self.insertion_point = reducer.insertion_point  # type: ignore[misc]
        self.reducer = reducer
        self.values: list[Tensor] = []

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        self.values.append(self.reducer.statistics(x, context, num_prefix))
        return Reduction(x[:, :1])
