"""Selection of the kept tokens: random, variance, attention top-k, representation shift, SAINT,
EViT, POMT, ATS, k-medoids.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.matching import unit_keys
from benchmarks.baselines.network import Context, Reducer, Reduction, Selector, gather_rows

ops = torch.ops.cropr


def random_scores(x: Tensor) -> Tensor:
    return torch.rand(x.shape[:2], device=x.device)


def variance_scores(x: Tensor) -> Tensor:
    """Variance of a token over its channels."""
    return x.float().var(-1)


class Random(Selector):
    """Keep uniformly random tokens."""

    def scores(self, x: Tensor, context: Context, num_prefix: int) -> Tensor:
        return random_scores(x)


class FeatureVariance(Selector):
    """Keep the tokens with the highest variance over their channels."""

    def scores(self, x: Tensor, context: Context, num_prefix: int) -> Tensor:
        return variance_scores(x)


class PixelVariance(Selector):
    """Keep the tokens whose patch of the image has the highest variance of pixels."""

    needs = frozenset({"patches"})

    def prepare(self, patches: Tensor) -> Tensor:
        return patches.float().var(-1)

    def scores(self, x: Tensor, context: Context, num_prefix: int) -> Tensor:
        scores = F.pad(context.require("patches"), (num_prefix, 0))
        return scores if context.positions is None else scores.gather(1, context.positions)


class AttentionTopK(Selector):
    """Keep the tokens the class token attends to most in this block, by the mean over heads."""

    needs = frozenset({"class row"})

    def scores(self, x: Tensor, context: Context, num_prefix: int) -> Tensor:
        return context.require("class_row").mean(1)


class RepresentationShift(Selector):
    """Keep the tokens the MLP changes most, by the norm of its update.

    Source: Choi et al. 2025 (arXiv 2508.00367).
    """

    needs = frozenset({"update"})

    def scores(self, x: Tensor, context: Context, num_prefix: int) -> Tensor:
        return context.require("update").float().norm(dim=-1)


class SAINT(Selector):
    """Prune, between attention and MLP, even patches similar to many odd ones.

    The redundancy of a patch is the number of odd patches with a similarity of at least the
    threshold, times exp(10 (their mean similarity - threshold)); if there is none, its mean
    similarity to all odd ones. Similarity is the cosine of the keys. The most redundant go. The
    schedule sets their number, which the authors vary by image. Tokens stay in order of position;
    the authors put the odd ones after the others. Source: Jeddi et al. 2025 (arXiv 2503.11549) and
    its code.
    """

    needs = frozenset({"keys"})
    insertion_point = "attention"

    def __init__(self, threshold: float = 0.75):
        super().__init__()
        self.threshold = threshold

    def scores(self, x: Tensor, context: Context, num_prefix: int) -> Tensor:
        keys = unit_keys(context, num_prefix)
        cosine = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
        similar = cosine >= self.threshold
        count = similar.sum(2)
        mean = (cosine * similar).sum(2) / count.clamp_min(1)
        redundancy = torch.where(
            count > 0, count * (10 * (mean - self.threshold)).exp(), cosine.mean(2)
        )
        scores = torch.full_like(x[..., 0], torch.inf, dtype=torch.float32)
        scores[:, num_prefix::2] = -redundancy.float()
        return scores

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        limit = (x.shape[1] - num_prefix + 1) // 2
        count = x.shape[1] - num_keep
        if count > limit:
            raise ValueError(f"SAINT: of {x.shape[1]} tokens at most {limit} can go, not {count}")
        return super().forward(x, context, num_keep, num_prefix)


class EViT(Reducer):
    """Attention top-k between attention and MLP, plus the attention-weighted sum of the pruned.

    The sum is one of the num_keep. Source: Liang et al. 2022, equation 3.
    """

    needs = frozenset({"class row"})
    insertion_point = "attention"

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        row = context.require("class_row").mean(1)
        kept_idx, pruned_idx = ops.select(row.detach().float(), num_keep - 1, num_prefix)
        share = row.gather(1, pruned_idx).unsqueeze(1).type_as(x)
        return Reduction(torch.cat([ops.gather(x, kept_idx), share @ ops.gather(x, pruned_idx)], 1))


class POMT(Reducer):
    """Keep tokens with large values that patches attend to, plus the mean of the pruned ones.

    The mean is one of the num_keep. A patch's score is the sum of two terms: the attention it
    receives from all patches, each the maximum over heads, relative to the patch that receives
    most; and a softmax over all tokens of the sum over channels of the values, each the maximum
    over heads. Differences from the authors: tokens stay in order of position, not of score; the
    most attention is that of the image, not of the batch, so that an image's result does not depend
    on its batch. Source: Eliopoulos et al. 2025 (arXiv 2407.05941, Pruning One More Token) and its
    code, which prunes once, in the fourth block.
    """

    needs = frozenset({"attention", "values"})
    insertion_point = "attention"

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        received = (
            context.require("attention").detach()[:, :, num_prefix:].amax(1).sum(1)[:, num_prefix:]
        )
        values = (
            context.require("values").detach().float().amax(1).sum(-1).softmax(1)[:, num_prefix:]
        )
        scores = F.pad(received.float() / received.amax(1, keepdim=True) + values, (num_prefix, 0))
        kept_idx, pruned_idx = ops.select(scores, num_keep - 1, num_prefix)
        mean = ops.gather(x, pruned_idx).mean(1, keepdim=True)
        return Reduction(torch.cat([ops.gather(x, kept_idx), mean], 1))


class ATS(Reducer):
    """Adaptive token sampling: keep tokens at evenly spaced points of the cumulated significance.

    Significance is the class token's attention times the norm of the value, normalized for each
    head and summed over heads. A token may be chosen more than once, and stays once: images keep
    different numbers, at most num_keep. The rest of the list is padding, of size 0. The choice
    comes before the attention, so only chosen tokens are its queries. Source: Fayyaz et al. 2022,
    section 3.
    """

    needs = frozenset({"class row", "values"})
    insertion_point = "queries"

    def __init__(self, *, trim: bool = False):
        """With `trim` cut the padding to the longest list, at the price of a synchronization."""
        super().__init__()
        self.trim = trim

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        head = (context.require("class_row") * context.require("values").float().norm(dim=-1))[
            :, :, num_prefix:
        ]
        score = (head / head.sum(-1, keepdim=True)).sum(1).detach()
        cumulated = score.cumsum(1)
        count = num_keep - num_prefix
        points = (torch.arange(count, device=x.device) + 0.5) / count * cumulated[:, -1:]
        chosen = torch.searchsorted(cumulated, points).clamp_max(score.shape[1] - 1)
        first = F.pad(chosen[:, 1:] != chosen[:, :-1], (1, 0), value=True)
        idx = F.pad(chosen + num_prefix, (num_prefix, 0))
        sizes = F.pad(first, (num_prefix, 0), value=True).float()
        idx[:, :num_prefix] = torch.arange(num_prefix, device=x.device)
        if self.trim:
            longest = int(sizes.sum(1).max())
            order = sizes.sort(dim=1, descending=True, stable=True).indices[:, :longest]
            idx = idx.gather(1, order)
            sizes = sizes.gather(1, order)
        return Reduction(gather_rows(x, idx), idx, sizes=sizes)


def distances(x: Tensor) -> Tensor:
    """Pairwise Euclidean distances (B, N, N), float32, of tokens (B, N, D)."""
    x = x.detach().float()
    return torch.cdist(x, x)


class KMedoids(Reducer):
    """Keep the medoids of clusters, weighted by the attention each token receives.

    The first medoids are the tokens that receive most. In each round every token joins the nearest
    medoid, and the member of each cluster with the least weighted distance to the others becomes
    its medoid. Source: Marin et al. 2021 (Token Pooling).
    """

    needs = frozenset({"attention"})

    def __init__(self, rounds: int = 3):
        super().__init__()
        self.rounds = rounds

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        weight = context.require("attention").detach().sum((1, 2))[:, num_prefix:]
        medoids = self.medoids(distances(x[:, num_prefix:]), weight, num_keep - num_prefix)
        idx = F.pad(medoids.sort(1).values + num_prefix, (num_prefix, 0))
        idx[:, :num_prefix] = torch.arange(num_prefix, device=x.device)
        return Reduction(ops.gather(x, idx), idx)

    def medoids(self, pairwise: Tensor, weight: Tensor, count: int) -> Tensor:
        """Positions (B, count), unordered, from distances (B, N, N) and weights (B, N)."""
        batch, points = weight.shape
        medoids = weight.topk(count, dim=1).indices
        cluster_idx = torch.arange(count, device=pairwise.device).expand(batch, -1)
        point_idx = torch.arange(points, device=pairwise.device).expand(batch, -1)
        for _ in range(self.rounds):
            # Distances are symmetric: rows are faster to fetch
            cluster = ops.gather(pairwise, medoids).argmin(1)
            # Only among equal tokens would it not belong to itself anyway
            cluster.scatter_(1, medoids, cluster_idx)
            same_cluster = cluster.unsqueeze(2) == cluster.unsqueeze(1)
            cost = (torch.where(same_cluster, pairwise, 0.0) @ weight.unsqueeze(2)).squeeze(2)
            least = cost.new_full((batch, count), torch.inf).scatter_reduce(
                1, cluster, cost, "amin"
            )
            best = point_idx.masked_fill(cost > least.gather(1, cluster), points)
            medoids = torch.full_like(medoids, points).scatter_reduce(1, cluster, best, "amin")
        return medoids
