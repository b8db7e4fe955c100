"""The Cropr module: scorer, aggregator and auxiliary head (paper section 3.1)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Split(NamedTuple):
    """Tokens split in two: kept (B, K, D) and pruned (B, R, D), with their positions, int64, ascending."""

    kept: Tensor
    kept_idx: Tensor
    pruned: Tensor
    pruned_idx: Tensor


class MultiHead(nn.Module):
    """Cross-attention as Transformers usually have it, with heads and projections: an ablation of the paper's.

    Its scores are linear in the token too, so that the queries fold into one vector just as well.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.v_proj, self.proj = (nn.Linear(dim, dim) for _ in range(3))
        self.k_proj = nn.Linear(dim, dim, bias=False)  # a bias would raise all scores alike

    def forward(self, x: Tensor, queries: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, M, D) from x (B, N, D) and queries (M, D); bias (B, 1, 1, N) is added to the logits."""
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q_proj(queries).expand(x.shape[0], -1, -1), self.k_proj(x), self.v_proj(x))
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))

    def fold(self, queries: Tensor) -> Tensor:
        """The vector (D,) whose product with a token is the sum of its logits over queries and heads."""
        with torch.autocast(queries.device.type, enabled=False):  # selection is decided in float32
            return self.q_proj(queries).sum(0) @ self.k_proj.weight


class Aggregator(nn.Module):
    """What a query learns from: cross-attention over the tokens, an MLP and the auxiliary head.

        out = softmax(Q x^T / sqrt(D)) x;   out = out + MLP(LayerNorm(out));   prediction = Linear(LayerNorm(out))

    Stop-gradient: x is detached, so the auxiliary loss reaches this module and its queries, never the backbone. The
    options are those of `Cropr`.
    """

    def __init__(
        self,
        dim: int,
        num_outputs: int,
        mlp_ratio: float = 4.0,
        *,
        num_heads: int | None = None,
        stop_gradient: bool = True,
    ):
        super().__init__()
        self.stop_gradient = stop_gradient
        self.attention = None if num_heads is None else MultiHead(dim, num_heads)
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6) if hidden else None
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)) if hidden else None
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_outputs)

    def forward(self, x: Tensor, queries: Tensor, log_sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predictions (B, M, outputs) from x (B, N, D) with queries (M, D), and the tokens' scores (B, N).

        log_sizes (B, N) is added to the logits of the attention, for tokens that are padding.
        """
        x = x.detach() if self.stop_gradient else x
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if log_sizes is None else log_sizes.to(x.dtype)[:, None, None]
        if self.attention is not None:
            out = self.attention(x, queries, bias)
            scores = torch.ops.cropr.scores(x.detach(), self.attention.fold(queries).detach())
        elif self.stop_gradient and bias is None:
            out, scores = torch.ops.cropr.attend_scores(x, queries, x.shape[-1] ** -0.5)
        else:  # attend has no gradient for x, and no bias
            one_head, asked = x.unsqueeze(1), queries.to(x.dtype).expand(len(x), 1, -1, -1)
            out = F.scaled_dot_product_attention(asked, one_head, one_head, attn_mask=bias)
            out, scores = out.squeeze(1), torch.ops.cropr.scores(x.detach(), queries.detach())
        if self.norm1 is not None and self.mlp is not None:
            out = out + self.mlp(self.norm1(out))
        return self.head(self.norm2(out)), scores


def fold_queries(queries: Tensor) -> Tensor:
    """Sum queries (M, D) into the vector (D,), float32, that gives every token the same score."""
    return queries.detach().float().sum(0)


class Cropr(nn.Module):
    """Score tokens with learned queries and split them into kept and pruned.

    Args:
        dim: D, width of the tokens.
        num_outputs: width of the auxiliary prediction (classes); 0 leaves the training path out.
        num_queries: M, 1 for classification, one per patch for dense tasks.
        mlp_ratio: hidden width of the aggregator's MLP over D; 0 for no MLP.
        num_heads: None, the paper's scorer, or heads with projections.
        stop_gradient: whether the auxiliary loss ends at the tokens; if not it reaches the backbone.
        sampling: in training draw the tokens that stay, without replacement and in proportion to the softmax of
            their mean logits / sqrt(D), instead of taking the best.

    The learned parameter is `queries` (M, D), truncated normal with std D^-0.5.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_outputs: int = 0,
        num_queries: int = 1,
        mlp_ratio: float = 4.0,
        *,
        num_heads: int | None = None,
        stop_gradient: bool = True,
        sampling: bool = False,
    ):
        super().__init__()
        if dim < 1 or num_queries < 1 or num_outputs < 0 or mlp_ratio < 0:
            raise ValueError(
                "Cropr: dim and num_queries must be >= 1, num_outputs and mlp_ratio >= 0, got "
                f"dim={dim}, num_queries={num_queries}, num_outputs={num_outputs}, mlp_ratio={mlp_ratio}"
            )
        if num_heads is not None and (num_heads < 1 or dim % num_heads or not num_outputs):
            raise ValueError(
                f"Cropr: num_heads must divide dim={dim}, and num_outputs be >= 1 so that its projections learn, got "
                f"num_heads={num_heads}, num_outputs={num_outputs}"
            )
        self.queries = nn.Parameter(torch.empty(num_queries, dim))
        nn.init.trunc_normal_(self.queries, std=dim**-0.5)
        self.sampling = sampling
        self.aggregator = (
            Aggregator(dim, num_outputs, mlp_ratio, num_heads=num_heads, stop_gradient=stop_gradient)
            if num_outputs
            else None
        )

    def query(self) -> Tensor:
        """The folded query (D,), float32, without gradient."""
        attention = None if self.aggregator is None else self.aggregator.attention
        return fold_queries(self.queries if attention is None else attention.fold(self.queries)[None])

    def predict(self, x: Tensor, log_sizes: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Auxiliary prediction from x (B, N, D), and the scores (B, N) that fall out of it, for forward.

        The prediction is (B, outputs) with one query, else (B, M, outputs), with gradient for the module's own
        parameters, and for x only without stop-gradient. Both are None where there is nothing to predict or to draw.
        Under autocast the tokens are read, and scored, in the autocast dtype. log_sizes (B, N) is added to the logits
        of the attention, for tokens that are padding.
        """
        prediction, scores = (None, None) if self.aggregator is None else self.aggregator(x, self.queries, log_sizes)
        if prediction is not None and self.queries.shape[0] == 1:
            prediction = prediction.squeeze(1)
        if self.sampling and self.training:  # Gumbel noise makes the top K a draw without replacement
            scores = torch.ops.cropr.scores(x.detach(), self.query()) if scores is None else scores
            noise = -torch.empty_like(scores).exponential_().log()
            scores = scores / (self.queries.shape[0] * x.shape[-1] ** 0.5) + noise
        return prediction, scores

    def forward(
        self,
        x: Tensor,
        num_keep: int,
        num_prefix: int = 0,
        scores: Tensor | None = None,
        priority: Tensor | None = None,
    ) -> Split:
        """Split x (B, N, D); gradient reaches x through the copied rows only. Errors as in `cropr::prune`.

        With scores (B, N) from `predict` x is not read a second time to score it. priority (B, N), int8, names tokens
        that stay (1) or leave (-1) before all others.
        """
        if scores is not None:
            return Split(*torch.ops.cropr.split(x, scores, num_keep, num_prefix, priority))
        return Split(*torch.ops.cropr.prune(x, self.query(), num_keep, num_prefix, priority))


class FoldedCropr(nn.Module):
    """A Cropr module for inference: one folded query (D,), nothing to train."""

    folded: Tensor

    def __init__(self, module: Cropr):
        super().__init__()
        self.register_buffer("folded", module.query().clone())

    def query(self) -> Tensor:
        return self.folded

    def predict(self, x: Tensor, log_sizes: Tensor | None = None) -> tuple[None, None]:
        return None, None

    def forward(
        self,
        x: Tensor,
        num_keep: int,
        num_prefix: int = 0,
        scores: Tensor | None = None,
        priority: Tensor | None = None,
    ) -> Split:
        """Split x (B, N, D) exactly as the module it was folded from; it has no scores to be given."""
        return Split(*torch.ops.cropr.prune(x, self.folded, num_keep, num_prefix, priority))


def loss(criterion: Callable[..., Tensor], output: Tensor, aux: list[Tensor], target: Any) -> Tensor:
    """Main loss plus the unweighted sum of all auxiliary losses (paper section 3.1).

    Args:
        criterion: called as criterion(prediction, target) for the output and for each auxiliary prediction.
        output: the network's output.
        aux: auxiliary predictions, one per Cropr module.
        target: whatever the criterion takes.
    """
    total = criterion(output, target)
    for prediction in aux:
        total = total + criterion(prediction, target)
    return total
