"""Ways to choose the tokens that stay: random, variance, attention top-k, representation shift, SAINT,
EViT, POMT, ATS, k-medoids."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.matching import unit_keys
from benchmarks.baselines.network import Context, Reducer, Reduction, Selector, take

ops = torch.ops.cropr


def random_scores(x: Tensor) -> Tensor:
    return torch.rand(x.shape[:2], device=x.device)


def variance_scores(x: Tensor) -> Tensor:
    """Variance of a token over its channels."""
    return x.float().var(-1)


class Random(Selector):
    """Uniformly random tokens stay."""

    def scores(self, x: Tensor, context: Context, num_prefix: int) -> Tensor:
        return random_scores(x)


class FeatureVariance(Selector):
    """Tokens with the highest variance over their channels stay."""

    def scores(self, x: Tensor, context: Context, num_prefix: int) -> Tensor:
        return variance_scores(x)


class PixelVariance(Selector):
    """Tokens whose patch of the image has the highest variance stay: decided by the image alone."""

    needs = frozenset({"patches"})

    def prepare(self, patches: Tensor) -> Tensor:
        return patches.float().var(-1)

    def scores(self, x: Tensor, context: Context, num_prefix: int) -> Tensor:
        scores = F.pad(context.need("patches"), (num_prefix, 0))
        return scores if context.positions is None else scores.gather(1, context.positions)


class AttentionTopK(Selector):
    """Those stay that the class token attends to most in this block: its row of the softmax, mean over heads."""

    needs = frozenset({"class row"})

    def scores(self, x: Tensor, context: Context, num_prefix: int) -> Tensor:
        return context.need("class_row").mean(1)


class RepresentationShift(Selector):
    """Those stay to which the MLP adds most: the norm of its update. Source: Choi et al. 2025 (arXiv 2508.00367)."""

    needs = frozenset({"update"})

    def scores(self, x: Tensor, context: Context, num_prefix: int) -> Tensor:
        return context.need("update").float().norm(dim=-1)


class SAINT(Selector):
    """Between attention and MLP those even patches go that are like many odd ones: redundant before unimportant.

    A patch's score is the number of odd patches that are as like as the threshold, times exp(10 (their mean likeness -
    threshold)); its mean likeness to all odd ones, if there is none. Likeness is the cosine of the keys. Those with the
    highest go. How many is the schedule's; theirs differs by image. Tokens stay in order of position, where theirs puts
    the odd ones behind the others. Source: Jeddi et al. 2025 (arXiv 2503.11549) and its code.
    """

    needs = frozenset({"keys"})
    place = "attention"

    def __init__(self, threshold: float = 0.75):
        super().__init__()
        self.threshold = threshold

    def scores(self, x: Tensor, context: Context, num_prefix: int) -> Tensor:
        keys = unit_keys(context, num_prefix)
        cosine = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
        near = cosine >= self.threshold
        count = near.sum(2)
        likeness = (cosine * near).sum(2) / count.clamp_min(1)
        redundant = torch.where(count > 0, count * (10 * (likeness - self.threshold)).exp(), cosine.mean(2))
        scores = torch.full_like(x[..., 0], torch.inf, dtype=torch.float32)
        scores[:, num_prefix::2] = -redundant.float()
        return scores

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        most, count = (x.shape[1] - num_prefix + 1) // 2, x.shape[1] - num_keep
        if count > most:
            raise ValueError(f"SAINT: of {x.shape[1]} tokens at most {most} can go, not {count}")
        return super().forward(x, context, num_keep, num_prefix)


class EViT(Reducer):
    """Attention top-k between attention and MLP, and one token more: the attention-weighted sum of the others.

    The sum is one of the num_keep. Source: Liang et al. 2022, equation 3.
    """

    needs = frozenset({"class row"})
    place = "attention"

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        row = context.need("class_row").mean(1)
        kept_idx, pruned_idx = ops.select(row.detach().float(), num_keep - 1, num_prefix)
        share = row.gather(1, pruned_idx).unsqueeze(1).type_as(x)
        return Reduction(torch.cat([ops.gather(x, kept_idx), share @ ops.gather(x, pruned_idx)], 1))


class POMT(Reducer):
    """Those stay that patches attend to and whose values are large, and one token more: the mean of the others.

    The mean is one of the num_keep. A patch's score is the attention that it receives from all patches, each the
    maximum over heads, over that of the patch which receives most; and a softmax over all tokens of the sum over
    channels of the values, each the maximum over heads. Tokens stay in order of position, which theirs sorts by score;
    its highest attention is that of the batch, here of the image, so that a batch changes nothing. Source: Eliopoulos
    et al. 2025 (arXiv 2407.05941, Pruning One More Token) and its code, which prunes once, in the fourth block.
    """

    needs = frozenset({"attention", "values"})
    place = "attention"

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        received = context.need("attention").detach()[:, :, num_prefix:].amax(1).sum(1)[:, num_prefix:]
        values = context.need("values").detach().float().amax(1).sum(-1).softmax(1)[:, num_prefix:]
        scores = F.pad(received.float() / received.amax(1, keepdim=True) + values, (num_prefix, 0))
        kept_idx, pruned_idx = ops.select(scores, num_keep - 1, num_prefix)
        mean = ops.gather(x, pruned_idx).mean(1, keepdim=True)
        return Reduction(torch.cat([ops.gather(x, kept_idx), mean], 1))


class ATS(Reducer):
    """Adaptive token sampling: num_keep evenly spaced points of the cumulated significance choose who stays.

    Significance is the class token's attention times the norm of the value, of each head, normalised, and summed over
    heads. A token may be chosen more than once, and stays once: images keep different numbers, at most num_keep. The
    rest of the list is padding, of size 0. The choice comes before the attention, so only those chosen are queries of
    it. Source: Fayyaz et al. 2022, section 3.
    """

    needs = frozenset({"class row", "values"})
    place = "queries"

    def __init__(self, *, trim: bool = False):
        """trim: cut the padding down to the longest list of the batch, for which the host must wait."""
        super().__init__()
        self.trim = trim

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        head = (context.need("class_row") * context.need("values").float().norm(dim=-1))[:, :, num_prefix:]
        score = (head / head.sum(-1, keepdim=True)).sum(1).detach()
        cumulated = score.cumsum(1)
        count = num_keep - num_prefix
        points = (torch.arange(count, device=x.device) + 0.5) / count * cumulated[:, -1:]
        chosen = torch.searchsorted(cumulated, points).clamp_max(score.shape[1] - 1)
        first = F.pad(chosen[:, 1:] != chosen[:, :-1], (1, 0), value=True)
        idx, sizes = F.pad(chosen + num_prefix, (num_prefix, 0)), F.pad(first, (num_prefix, 0), value=True).float()
        idx[:, :num_prefix] = torch.arange(num_prefix, device=x.device)
        if self.trim:
            longest = int(sizes.sum(1).max())
            order = sizes.sort(dim=1, descending=True, stable=True).indices[:, :longest]
            idx, sizes = idx.gather(1, order), sizes.gather(1, order)
        return Reduction(take(x, idx), idx, sizes=sizes)


def distances(x: Tensor) -> Tensor:
    """Euclidean distances of tokens (B, N, D) to one another, (B, N, N) float32."""
    x = x.detach().float()
    return torch.cdist(x, x)


class KMedoids(Reducer):
    """Tokens that stand for a cluster stay: rounds of k-medoids, weighted by the attention each token receives.

    Starts at those that receive most. In each round tokens go to the nearest medoid, and of each cluster the member
    with the least weighted distance to the others becomes its medoid. Source: Marin et al. 2021 (Token Pooling).
    """

    needs = frozenset({"attention"})

    def __init__(self, rounds: int = 3):
        super().__init__()
        self.rounds = rounds

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        weight = context.need("attention").detach().sum((1, 2))[:, num_prefix:]
        medoids = self.medoids(distances(x[:, num_prefix:]), weight, num_keep - num_prefix)
        idx = F.pad(medoids.sort(1).values + num_prefix, (num_prefix, 0))
        idx[:, :num_prefix] = torch.arange(num_prefix, device=x.device)
        return Reduction(ops.gather(x, idx), idx)

    def medoids(self, pairwise: Tensor, weight: Tensor, count: int) -> Tensor:
        """Of points with distances (B, N, N) and weights (B, N): (B, count) positions, in no order."""
        batch, points = weight.shape
        medoids = weight.topk(count, dim=1).indices
        own = torch.arange(count, device=pairwise.device).expand(batch, -1)
        everyone = torch.arange(points, device=pairwise.device).expand(batch, -1)
        for _ in range(self.rounds):
            cluster = ops.gather(pairwise, medoids).argmin(1)  # distances are symmetric: rows are faster to fetch
            cluster.scatter_(1, medoids, own)  # only among equal tokens would it not belong to itself anyway
            together = cluster.unsqueeze(2) == cluster.unsqueeze(1)
            cost = (torch.where(together, pairwise, 0.0) @ weight.unsqueeze(2)).squeeze(2)
            least = cost.new_full((batch, count), torch.inf).scatter_reduce(1, cluster, cost, "amin")
            best = everyone.masked_fill(cost > least.gather(1, cluster), points)
            medoids = torch.full_like(medoids, points).scatter_reduce(1, cluster, best, "amin")
        return medoids
