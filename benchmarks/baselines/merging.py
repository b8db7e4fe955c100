"""Ways to merge tokens by likeness: ToMe, and into clusters DPC-KNN and ATC."""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.matching import absorb, behind_prefix, rows_of, unit_keys
from benchmarks.baselines.network import Context, Reducer, Reduction
from benchmarks.baselines.selection import distances
from cropr_kernels.utils.optional import import_optional

ops = torch.ops.cropr


class ToMe(Reducer):
    """Token Merging (Bolya et al. 2023): between attention and MLP the most similar even and odd tokens merge in pairs.

    Args:
        proportional: log(size) on the attention logits, as ToMe has it off the shelf.
    """

    needs = frozenset({"keys"})
    place = "attention"

    def __init__(self, *, proportional: bool = True):
        super().__init__()
        self.proportional = proportional

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        tokens = x.shape[1]
        most = (tokens + 1) // 2 - (num_prefix + 1) // 2  # the even ones that are no prefix
        if tokens - num_keep > most:
            raise ValueError(
                f"ToMe: {tokens} tokens, {num_prefix} of them prefix, can lose {most} at most, not {tokens - num_keep}"
            )
        return merge_pairs(x, context.need("keys").mean(1), context.sizes, tokens - num_keep, num_prefix)


def merge_pairs(x: Tensor, metric: Tensor, sizes: Tensor | None, count: int, num_prefix: int) -> Reduction:
    """One bipartite merge of x (B, N, D): `count` even tokens go into their most similar odd ones.

    Returns:
        Tokens (B, N - count, D): prefix, unmerged even ones, odd ones; their sizes, float32, and rows.
    """
    metric = F.normalize(metric, dim=-1)
    even_prefix, odd_prefix = (num_prefix + 1) // 2, num_prefix // 2
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    similarity[:, :even_prefix] = -torch.inf  # prefix tokens neither move nor take others in
    similarity[:, :, :odd_prefix] = -torch.inf
    best, partner = similarity.max(-1)
    stays, goes = ops.select(-best.float(), best.shape[1] - count, even_prefix)
    stays = stays[:, even_prefix:]
    if sizes is None:
        sizes = x.new_ones(x.shape[:2], dtype=torch.float32)
    mass = x * sizes.unsqueeze(-1).to(x.dtype)
    even, odd = mass[:, ::2], mass[:, 1::2]
    target = partner.gather(1, goes)
    odd = odd.scatter_add(1, target.unsqueeze(-1).expand(-1, -1, x.shape[2]), ops.gather(even, goes))
    odd_sizes = sizes[:, 1::2].scatter_add(1, target, sizes[:, ::2].gather(1, goes))
    merged = torch.cat([mass[:, :num_prefix], ops.gather(even, stays), odd[:, odd_prefix:]], 1)
    sizes = torch.cat([sizes[:, :num_prefix], sizes[:, ::2].gather(1, stays), odd_sizes[:, odd_prefix:]], 1)
    num_odd = odd.shape[1]

    def rows() -> Tensor:  # keeps no tokens alive
        all_odd = torch.arange(odd_prefix, num_odd, device=stays.device).expand(len(stays), -1)
        kept = torch.cat([behind_prefix(2 * stays - num_prefix, num_prefix), 2 * all_odd + 1], 1)
        return rows_of(kept, 2 * goes, target + kept.shape[1] - num_odd)

    return Reduction(merged / sizes.unsqueeze(-1).to(x.dtype), sizes=sizes, rows=rows)


class DPCKNN(Reducer):
    """Clusters around tokens that are dense and far from denser ones (density peaks) become their weighted means.

    log density = -mean squared distance to the nearest neighbours, distances over sqrt(D); delta = distance to the
    nearest denser token, to the farthest for the densest; centres have the highest density x delta. Sources: Du et al.
    2016 for the clustering, Zeng et al. 2022 (TCFormer) for the merging.

    Args:
        dim: D, for weights exp(score) with a learned score of each token; without it all weigh the same.
    """

    def __init__(self, dim: int | None = None, *, neighbours: int = 5):
        super().__init__()
        self.neighbours, self.score = neighbours, None if dim is None else nn.Linear(dim, 1)

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        prefix, patches = x[:, :num_prefix], x[:, num_prefix:]
        batch, _, dim = patches.shape
        count = num_keep - num_prefix
        cluster = self.clusters(distances(patches) / dim**0.5, count)
        rows = (cluster + count * torch.arange(batch, device=x.device).unsqueeze(1)).flatten()
        weight = torch.ones_like(patches[..., :1]) if self.score is None else self.score(patches).exp()
        mass = x.new_zeros(batch * count, dim).index_add(0, rows, (patches * weight).flatten(0, 1).type_as(x))
        total = x.new_zeros(batch * count, 1).index_add(0, rows, weight.flatten(0, 1).type_as(x))
        means = torch.cat([prefix, (mass / total).unflatten(0, (batch, count))], 1)
        return Reduction(means, rows=lambda: behind_prefix(cluster, num_prefix))

    def clusters(self, pairwise: Tensor, count: int) -> Tensor:
        """Of points with distances (B, N, N): the cluster of each, (B, N) from 0 to count - 1."""
        batch, points, _ = pairwise.shape
        near = pairwise.topk(min(self.neighbours + 1, points), dim=2, largest=False).values[:, :, 1:]  # 0: the point
        density = -near.square().mean(2)  # its logarithm: for tokens far apart exp would be 0
        denser = density.unsqueeze(1) > density.unsqueeze(2)
        delta = pairwise.masked_fill(~denser, torch.inf).amin(2)
        delta = delta.where(delta.isfinite(), pairwise.amax(2))
        centres = (density + delta.log()).topk(count, dim=1).indices.sort(1).values
        cluster = ops.gather(pairwise, centres).argmin(1)
        return cluster.scatter(1, centres, torch.arange(count, device=pairwise.device).expand(batch, -1))


class ATC(Reducer):
    """Agglomerative clusters of the keys, by 1 - cosine, become their means: the closest two until num_keep are left.

    SciPy clusters on the host, one image after the other. Source: Haurum et al. 2024 (arXiv 2409.11923).

    Args:
        linkage: how far clusters are from one another: the mean, largest or smallest distance of their members.
    """

    needs = frozenset({"keys"})
    place = "attention"

    def __init__(self, linkage: Literal["average", "complete", "single"] = "average"):
        super().__init__()
        self.linkage = linkage

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        keys = unit_keys(context, num_prefix)
        patches = keys.shape[1]
        row, column = torch.triu_indices(patches, patches, 1, device=x.device)
        cosine = (keys @ keys.transpose(1, 2)).flatten(1).index_select(1, row * patches + column)
        pairwise = (1 - cosine).double().cpu().numpy()
        parts = zip(*(self.clusters(image, patches, x.shape[1] - num_keep) for image in pairwise))
        kept, moved, target = (torch.from_numpy(np.stack(part)).to(x.device) for part in parts)
        return absorb(x, context, behind_prefix(kept, num_prefix), moved + num_prefix, target + num_prefix)

    def clusters(self, pairwise: np.ndarray, points: int, merges: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of points with distances (pairs,): the first of each cluster, all others, and the cluster of each of these.

        The tree is cut after so many merges: a threshold would leave fewer clusters where distances are equal.
        """
        hierarchy = import_optional("scipy.cluster.hierarchy", "demo", "ATC")
        tree = hierarchy.linkage(pairwise, self.linkage)[:merges, :2].astype(np.int64)
        root = np.arange(points + merges)
        for node in reversed(range(merges)):
            root[tree[node]] = root[points + node]
        _, first, cluster = np.unique(root[:points], return_index=True, return_inverse=True)
        others = np.delete(np.arange(points), first)
        return first, others, cluster[others]
