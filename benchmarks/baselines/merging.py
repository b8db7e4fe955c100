"""Ways to merge tokens by likeness: ToMe, DPC-KNN."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.network import Context, Reducer, Reduction
from benchmarks.baselines.selection import distances

ops = torch.ops.cropr


class ToMe(Reducer):
    """Token Merging (Bolya et al. 2023): between attention and MLP the most similar even and odd tokens merge in pairs.

    Args:
        proportional: log(size) on the attention logits, as ToMe has it off the shelf.
        fused: one call of `cropr::merge` does it. Tokens then stay in order of position, where ToMe puts the odd ones
            behind the others, so that the next block pairs other tokens.
        traced: say where tokens went, for maps of all positions; nobody who measures time asks for it.
    """

    needs = frozenset({"keys"})
    place = "attention"

    def __init__(self, *, proportional: bool = True, fused: bool = False, traced: bool = False):
        super().__init__()
        self.proportional, self.fused, self.traced = proportional, fused, traced

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        tokens = x.shape[1]
        most = (tokens + 1) // 2 - (num_prefix + 1) // 2  # the even ones that are no prefix
        if tokens - num_keep > most:
            raise ValueError(
                f"ToMe: {tokens} tokens, {num_prefix} of them prefix, can lose {most} at most, not {tokens - num_keep}"
            )
        merge = merge_fused if self.fused else merge_pairs
        count, metric = tokens - num_keep, context.need("keys").mean(1)
        merged, sizes, dest = merge(x, metric, context.sizes, count, num_prefix, self.traced)
        return Reduction(merged, sizes=sizes, dest=dest)


def merge_pairs(
    x: Tensor, metric: Tensor, sizes: Tensor | None, count: int, num_prefix: int, traced: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One bipartite merge of x (B, N, D): `count` even tokens go into their most similar odd ones.

    Returns:
        Tokens (B, N - count, D): prefix, unmerged even ones, odd ones; their sizes, float32; and, if traced, the row
        of them into which each token went, (B, N).
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
    dest = None
    if traced:
        before = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        order = torch.cat([before[:, :num_prefix], 2 * stays, before[:, 1::2][:, odd_prefix:]], 1)
        dest = before.scatter(1, order, before[:, : order.shape[1]])
        dest = dest.scatter(1, 2 * goes, dest.gather(1, 2 * target + 1))
    return merged / sizes.unsqueeze(-1).to(x.dtype), sizes, dest


def merge_fused(
    x: Tensor, metric: Tensor, sizes: Tensor | None, count: int, num_prefix: int, traced: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same merge by `cropr::merge`: tokens (B, N - count, D) in order of position, and the rest as above."""
    batch, tokens, _ = x.shape
    positions = torch.arange(tokens, device=x.device)
    stays = positions % 2 == 1
    stays[:num_prefix] = True
    odd, even = (positions[mask].expand(batch, -1) for mask in (stays, ~stays))
    sizes = x.new_ones(batch, tokens, dtype=torch.float32) if sizes is None else sizes
    merged, _, _, sizes, dest = ops.merge(x, odd, even, sizes, tokens - count, metric, num_prefix)
    return merged, sizes, dest if traced else None


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
        return Reduction(torch.cat([prefix, (mass / total).unflatten(0, (batch, count))], 1))

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
