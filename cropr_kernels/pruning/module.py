"""The Cropr module: scorer, aggregator and auxiliary head (paper section 3.1)."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.reference import fold_queries


class Scorer(nn.Module, ABC):
    """The module after a block, which decides which tokens are kept; `apply(make_module=...)` takes
    any subclass."""

    @abstractmethod
    def query(self) -> Tensor:
        """The vector (D,), float32, whose product with a token is its score; the engine and merging
        use it."""

    def is_random(self) -> bool:
        """Tell whether the query is known to be its random initial value."""
        return False

    def predict(
        self, x: Tensor, log_sizes: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Predict from x (B, N, D), in training, and return the scores (B, N) too if they are at
        hand; else None.

        log_sizes (B, N) is added to the logits of an attention over the tokens, for padding.
        """
        return None, None

    def forward(
        self,
        x: Tensor,
        num_keep: int,
        num_prefix: int = 0,
        scores: Tensor | None = None,
        priority: Tensor | None = None,
    ) -> ops.Split:
        """Split x (B, N, D); gradient reaches x through the copied rows only. Errors as in
        `cropr::prune`.

        With scores (B, N) from `predict`, x is not read a second time to score it. priority (B, N),
        int8: tokens that are kept (1) or pruned (-1) before all others.
        """
        if scores is not None:
            return ops.split(x, scores, num_keep, num_prefix, priority)
        return ops.prune(x, self.query(), num_keep, num_prefix, priority)


class Aggregator(nn.Module):
    """The training path of queries: cross-attention over the tokens, an MLP and the auxiliary head.

        out = softmax(Q x^T / sqrt(D)) x
        out = out + MLP(LayerNorm(out))
        prediction = Linear(LayerNorm(out))

    Stop-gradient: x is detached, so the auxiliary loss reaches this module and its queries, never
    the backbone.
    """

    def __init__(self, dim: int, num_outputs: int, mlp_ratio: float = 4.0):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6) if hidden else None
        self.mlp = (
            nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
            if hidden
            else None
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_outputs)

    def attend(self, x: Tensor, queries: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attend to x (B, N, D) with queries (M, D), and return (B, M, D) and the scores (B, N).

        bias (B, 1, 1, N) is added to the logits.
        """
        x = x.detach()
        if bias is None:
            return torch.ops.cropr.attend_scores(x, queries, x.shape[-1] ** -0.5)
        keys = x.unsqueeze(1)  # one head
        batched_queries = queries.to(x.dtype).expand(len(x), 1, -1, -1)
        out = F.scaled_dot_product_attention(batched_queries, keys, keys, attn_mask=bias)
        return out.squeeze(1), torch.ops.cropr.scores(x, queries.detach())

    def forward(
        self, x: Tensor, queries: Tensor, log_sizes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predict (B, M, outputs) from x (B, N, D) with queries (M, D), and return the scores (B,
        N) too.

        log_sizes (B, N) is added to the logits of the attention, for padding.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out, scores = self.attend(
            x, queries, None if log_sizes is None else log_sizes.to(x.dtype)[:, None, None]
        )
        if self.norm1 is not None and self.mlp is not None:
            out = out + self.mlp(self.norm1(out))
        return self.head(self.norm2(out)), scores


class Cropr(Scorer):
    """Score tokens with learned queries and split them into kept and pruned.

    Args:
        dim: D, width of the tokens.
        num_outputs: width of the auxiliary prediction (classes); 0: no training path, and fixed
            queries.
        num_queries: M, 1 for classification, one per patch for dense tasks.
        mlp_ratio: hidden width of the aggregator's MLP over D; 0 for no MLP.

    The learned parameter is `queries` (M, D), truncated normal with std D^-0.5.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self, dim: int, num_outputs: int = 0, num_queries: int = 1, mlp_ratio: float = 4.0
    ):
        super().__init__()
        if dim < 1 or num_queries < 1 or num_outputs < 0 or mlp_ratio < 0:
            raise ValueError(
                "Cropr: dim and num_queries must be >= 1, num_outputs and mlp_ratio >= 0, got "
                f"dim={dim}, num_queries={num_queries}, num_outputs={num_outputs}, "
                f"mlp_ratio={mlp_ratio}"
            )
        self.queries = nn.Parameter(torch.empty(num_queries, dim), requires_grad=num_outputs > 0)
        nn.init.trunc_normal_(self.queries, std=dim**-0.5)
        # No state: loaded, trained or calibrated queries differ
        self.initial = self.queries[0].detach().clone()
        self.aggregator = Aggregator(dim, num_outputs, mlp_ratio) if num_outputs else None
        self.register_load_state_dict_pre_hook(_translate_state)

    def query(self) -> Tensor:
        """The folded query (D,), float32, without gradient."""
        return fold_queries(self.queries.detach()).float()

    def is_random(self) -> bool:
        """Tell whether the queries have their initial values: neither trained, nor calibrated, nor
        loaded."""
        queries = self.queries.detach()
        is_local = not (queries.is_meta or self.initial.is_meta or hasattr(queries, "full_tensor"))
        return is_local and torch.equal(queries[0].cpu(), self.initial.to("cpu", queries.dtype))

    def predict(
        self, x: Tensor, log_sizes: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Predict from x (B, N, D), and return the scores (B, N) that fall out of it, for forward.

        The prediction is (B, outputs) with one query, else (B, M, outputs), with gradient for the
        module's own parameters alone. Both are None without a training path. Under autocast the
        tokens are read, and scored, in the autocast dtype. log_sizes (B, N) is added to the logits
        of the attention, for padding.
        """
        if self.aggregator is None:
            return None, None
        prediction, scores = self.aggregator(x, self.queries, log_sizes)
        return (prediction.squeeze(1) if self.queries.shape[0] == 1 else prediction), scores


class FoldedCropr(Scorer):
    """A Cropr module for inference: one folded query (D,), nothing to train."""

    folded: Tensor

    def __init__(self, module: Cropr):
        super().__init__()
        self.register_buffer("folded", module.query().clone())
        self.initial = self.folded.clone() if module.is_random() else None
        self.register_load_state_dict_pre_hook(_translate_state)

    def query(self) -> Tensor:
        return self.folded

    def is_random(self) -> bool:
        return self.initial is not None and torch.equal(
            self.folded.cpu(), self.initial.to("cpu", self.folded.dtype)
        )


def _translate_state(
    module: nn.Module, state: dict[str, Tensor], prefix: str, *args: object
) -> None:
    """Let modules with and without a training path load each other's state: a module leaves out or
    keeps its own."""
    queries = f"{prefix}queries"
    folded = f"{prefix}folded"
    if isinstance(module, FoldedCropr) and queries in state:
        state[folded] = fold_queries(state.pop(queries)).float()
    elif isinstance(module, Cropr) and len(module.queries) == 1 and folded in state:
        state[queries] = state.pop(folded).unsqueeze(0)
    saved = [name for name in state if name.startswith(f"{prefix}aggregator.")]
    aggregator = getattr(module, "aggregator", None)
    if aggregator is None:
        for name in saved:
            del state[name]
    elif not saved and queries in state:
        state.update(aggregator.state_dict(prefix=f"{prefix}aggregator."))


def loss(
    criterion: Callable[..., Tensor], output: Any, aux: list[Tensor], target: object
) -> Tensor:
    """Compute the main loss plus the unweighted sum of all auxiliary losses (paper section 3.1).

    Args:
        criterion: called as criterion(prediction, target) for the output and for each auxiliary
            prediction.
        output: of the network; of several, as from distilled models in training, the mean loss
            counts.
        aux: auxiliary predictions, one per Cropr module.
        target: passed on to the criterion.
    """
    outputs = output if isinstance(output, tuple | list) else (output,)
    total = torch.stack([criterion(prediction, target) for prediction in outputs]).mean(0)
    for prediction in aux:
        total = total + criterion(prediction, target)
    return total
