"""Merging by similarity: in pairs by ToMe, into clusters by DPC-KNN and ATC."""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.matching import absorb, after_prefix, rows_of, unit_keys
from benchmarks.baselines.network import Context, Reducer, Reduction
from benchmarks.baselines.selection import distances
from cropr_kernels.utils.optional import import_optional

ops = torch.ops.cropr


class ToMe(Reducer):
    """Merge the most similar even and odd tokens in pairs, between attention and MLP.

    Source: Bolya et al. 2023 (Token Merging).

    Args:
        proportional: log(size) on the attention logits, ToMe's default without training.
    """

    needs = frozenset({"keys"})
    insertion_point = "attention"

    def __init__(self, *, proportional: bool = True):
        super().__init__()
        self.proportional = proportional

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        tokens = x.shape[1]
        limit = (tokens + 1) // 2 - (num_prefix + 1) // 2  # even patches
        if tokens - num_keep > limit:
            raise ValueError(
                f"ToMe: {tokens} tokens, {num_prefix} of them prefix, can lose {limit} at most, "
                f"not {tokens - num_keep}"
            )
        return merge_pairs(
            x, context.require("keys").mean(1), context.sizes, tokens - num_keep, num_prefix
        )


def merge_pairs(
    x: Tensor, metric: Tensor, sizes: Tensor | None, count: int, num_prefix: int
) -> Reduction:
    """Merge `count` even tokens of x (B, N, D) into their most similar odd ones.

    Returns:
        Tokens (B, N - count, D): prefix, unmerged even ones, odd ones; their sizes, float32, and
        rows.
    """
    metric = F.normalize(metric, dim=-1)
    even_prefix = (num_prefix + 1) // 2
    odd_prefix = num_prefix // 2
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    similarity[:, :even_prefix] = -torch.inf  # prefix tokens neither merge nor are merged into
    similarity[:, :, :odd_prefix] = -torch.inf
    best, partner = similarity.max(-1)
    staying, leaving = ops.select(-best.float(), best.shape[1] - count, even_prefix)
    staying = staying[:, even_prefix:]
    if sizes is None:
        sizes = x.new_ones(x.shape[:2], dtype=torch.float32)
    mass = x * sizes.unsqueeze(-1).to(x.dtype)
    even, odd = mass[:, ::2], mass[:, 1::2]
    target = partner.gather(1, leaving)
    odd = odd.scatter_add(
        1, target.unsqueeze(-1).expand(-1, -1, x.shape[2]), ops.gather(even, leaving)
    )
    odd_sizes = sizes[:, 1::2].scatter_add(1, target, sizes[:, ::2].gather(1, leaving))
    merged = torch.cat([mass[:, :num_prefix], ops.gather(even, staying), odd[:, odd_prefix:]], 1)
    sizes = torch.cat(
        [sizes[:, :num_prefix], sizes[:, ::2].gather(1, staying), odd_sizes[:, odd_prefix:]], 1
    )
    num_odd = odd.shape[1]

    def rows() -> Tensor:  # refers to indices only, so that no tokens stay in memory
        all_odd = torch.arange(odd_prefix, num_odd, device=staying.device).expand(len(staying), -1)
        kept = torch.cat([after_prefix(2 * staying - num_prefix, num_prefix), 2 * all_odd + 1], 1)
        return rows_of(kept, 2 * leaving, target + kept.shape[1] - num_odd)

    return Reduction(merged / sizes.unsqueeze(-1).to(x.dtype), sizes=sizes, rows=rows)


class DPCKNN(Reducer):
    """Merge clusters around density peaks, dense tokens far from denser ones, into means.

    log density = -mean squared distance to the nearest neighbours, distances over sqrt(D); delta =
    distance to the nearest denser token, to the farthest for the densest; centres have the highest
    density x delta. Sources: Du et al. 2016 for the clustering, Zeng et al. 2022 (TCFormer) for the
    merging.

    Args:
        dim: D, for weights exp(score) with a learned score of each token; None: equal weights.
    """

    def __init__(self, dim: int | None = None, *, neighbours: int = 5):
        super().__init__()
        self.neighbours = neighbours
        self.score = None if dim is None else nn.Linear(dim, 1)

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        prefix = x[:, :num_prefix]
        patches = x[:, num_prefix:]
        batch, _, dim = patches.shape
        count = num_keep - num_prefix
        cluster = self.clusters(distances(patches) / dim**0.5, count)
        rows = (cluster + count * torch.arange(batch, device=x.device).unsqueeze(1)).flatten()
        weight = (
            torch.ones_like(patches[..., :1]) if self.score is None else self.score(patches).exp()
        )
        mass = x.new_zeros(batch * count, dim).index_add(
            0, rows, (patches * weight).flatten(0, 1).type_as(x)
        )
        total = x.new_zeros(batch * count, 1).index_add(0, rows, weight.flatten(0, 1).type_as(x))
        means = torch.cat([prefix, (mass / total).unflatten(0, (batch, count))], 1)
        return Reduction(means, rows=lambda: after_prefix(cluster, num_prefix))

    def clusters(self, pairwise: Tensor, count: int) -> Tensor:
        """Cluster of each point, (B, N) in [0, count), from distances (B, N, N)."""
        batch, points, _ = pairwise.shape
        # 0: the point
        near = pairwise.topk(min(self.neighbours + 1, points), dim=2, largest=False).values[
            :, :, 1:
        ]
        density = -near.square().mean(2)  # logarithm: exp would be 0 for tokens far apart
        denser = density.unsqueeze(1) > density.unsqueeze(2)
        delta = pairwise.masked_fill(~denser, torch.inf).amin(2)
        delta = delta.where(delta.isfinite(), pairwise.amax(2))
        centres = (density + delta.log()).topk(count, dim=1).indices.sort(1).values
        cluster = ops.gather(pairwise, centres).argmin(1)
        return cluster.scatter(
            1, centres, torch.arange(count, device=pairwise.device).expand(batch, -1)
        )


class ATC(Reducer):
    """Merge agglomerative clusters of the keys into means: the closest two, until num_keep remain.

    SciPy clusters on the CPU, one image after the other. Source: Haurum et al. 2024 (arXiv
    2409.11923).

    Args:
        linkage: distance of two clusters: the mean, largest or smallest distance of their members.
    """

    needs = frozenset({"keys"})
    insertion_point = "attention"

    def __init__(self, linkage: Literal["average", "complete", "single"] = "average"):
        super().__init__()
        self.linkage = linkage

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        keys = unit_keys(context, num_prefix)
        patches = keys.shape[1]
        row, column = torch.triu_indices(patches, patches, 1, device=x.device)
        cosine = (keys @ keys.transpose(1, 2)).flatten(1).index_select(1, row * patches + column)
        pairwise = (1 - cosine).double().cpu().numpy()
        clusters = [self.clusters(image, patches, x.shape[1] - num_keep) for image in pairwise]
        kept, moved, target = (
            torch.from_numpy(np.stack(idx)).to(x.device) for idx in zip(*clusters)
        )
        return absorb(
            x, context, after_prefix(kept, num_prefix), moved + num_prefix, target + num_prefix
        )

    def clusters(
        self, pairwise: np.ndarray, points: int, merges: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cluster points with distances (pairs,): first members, other members, clusters of the
        others.

        The tree is cut after a number of merges: a threshold would leave fewer clusters if
        distances are equal.
        """
        hierarchy = import_optional("scipy.cluster.hierarchy", "demo", "ATC")
        tree = hierarchy.linkage(pairwise, self.linkage)[:merges, :2].astype(np.int64)
        root = np.arange(points + merges)
        for node in reversed(range(merges)):
            root[tree[node]] = root[points + node]
        _, first, cluster = np.unique(root[:points], return_index=True, return_inverse=True)
        members = np.delete(np.arange(points), first)
        return first, members, cluster[members]
