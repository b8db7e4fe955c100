"""The paper's ablations of the scorer: Cropr's module with one change each, trained like it."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cropr_kernels.pruning.module import Aggregator, Cropr

ops = torch.ops.cropr


class NonSalientCropr(Cropr):
    """Keep the tokens that Cropr would prune."""

    def query(self) -> Tensor:
        return -super().query()

    def predict(
        self, x: Tensor, log_sizes: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        prediction, scores = super().predict(x, log_sizes)
        return prediction, None if scores is None else -scores


class SamplingCropr(Cropr):
    """Sample the kept tokens in training, without replacement, by the softmax of their logits.

    A token's logit is its mean over the queries. In eval the highest scores are kept.
    """

    def predict(
        self, x: Tensor, log_sizes: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        prediction, scores = super().predict(x, log_sizes)
        if self.training:  # Gumbel noise makes the top K a sample without replacement
            scores = ops.scores(x.detach(), self.query()) if scores is None else scores
            noise = -torch.empty_like(scores).exponential_().log()
            scores = scores / (self.queries.shape[0] * x.shape[-1] ** 0.5) + noise
        return prediction, scores


class OpenAggregator(Aggregator):
    """Aggregator without stop-gradient: the auxiliary loss reaches the tokens."""

    def attend(self, x: Tensor, queries: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        one_head = x.unsqueeze(1)
        batch_queries = queries.to(x.dtype).expand(len(x), 1, -1, -1)
        out = F.scaled_dot_product_attention(batch_queries, one_head, one_head, attn_mask=bias)
        return out.squeeze(1), ops.scores(x.detach(), queries.detach())


class OpenCropr(Cropr):
    """Cropr without stop-gradient, so that the auxiliary loss reaches the backbone."""

    def __init__(self, dim: int, num_outputs: int, num_queries: int = 1, mlp_ratio: float = 4.0):
        super().__init__(dim, num_outputs, num_queries, mlp_ratio)
        self.aggregator = OpenAggregator(dim, num_outputs, mlp_ratio)


class MultiHead(nn.Module):
    """Cross-attention as Transformers usually have it, with heads and projections.

    Its scores are linear in the token too, so that the queries fold into one vector just as well.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.v_proj, self.proj = (nn.Linear(dim, dim) for _ in range(3))
        self.k_proj = nn.Linear(dim, dim, bias=False)  # a bias would raise all scores alike

    def forward(self, x: Tensor, queries: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attend from queries (M, D) to x (B, N, D), with bias (B, 1, 1, N) on the logits."""
        projections = (
            self.q_proj(queries).expand(x.shape[0], -1, -1),
            self.k_proj(x),
            self.v_proj(x),
        )
        q, k, v = (rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for rows in projections)
        return self.proj(
            F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        )

    def fold(self, queries: Tensor) -> Tensor:
        """Fold queries into one (D,), float32, for the sum of logits over queries and heads."""
        with torch.autocast(queries.device.type, enabled=False):  # selection is decided in float32
            return (self.q_proj(queries).sum(0) @ self.k_proj.weight).detach().float()


class MultiHeadAggregator(Aggregator):
    """Reads the tokens through `MultiHead`."""

    def __init__(self, dim: int, num_outputs: int, mlp_ratio: float, num_heads: int):
        super().__init__(dim, num_outputs, mlp_ratio)
        self.attention = MultiHead(dim, num_heads)

    def attend(self, x: Tensor, queries: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        x = x.detach()
        return self.attention(x, queries, bias), ops.scores(x, self.attention.fold(queries))


class MultiHeadCropr(Cropr):
    """Cropr with heads and projections; queries are learned, as `cropr.calibrate` has no
    projections.

    Raises:
        ValueError: num_heads does not divide dim, or there is no output from which the projections
            could learn.
    """

    aggregator: MultiHeadAggregator

    def __init__(
        self,
        dim: int,
        num_outputs: int,
        num_queries: int = 1,
        mlp_ratio: float = 4.0,
        *,
        num_heads: int,
    ):
        if num_heads < 1 or dim % num_heads or num_outputs < 1:
            raise ValueError(
                f"MultiHeadCropr: num_heads must divide dim={dim}, and num_outputs be >= 1 so "
                "that its projections "
                f"learn, got num_heads={num_heads}, num_outputs={num_outputs}"
            )
        super().__init__(dim, num_outputs, num_queries, mlp_ratio)
        self.aggregator = MultiHeadAggregator(dim, num_outputs, mlp_ratio, num_heads)

    def query(self) -> Tensor:
        return self.aggregator.attention.fold(self.queries)


# By the name of the method, the factory of each layer's module: (width of the tokens, number of
# classes) -> module.
SCORERS: dict[str, Callable[[int, int], Cropr]] = {
    "non-salient": NonSalientCropr,
    "no MLP": partial(Cropr, mlp_ratio=0.0),
    "no stop-gradient": OpenCropr,
    "sampling": SamplingCropr,
    "several heads": partial(MultiHeadCropr, num_heads=3),
}
