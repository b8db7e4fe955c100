"""Learned reductions: DynamicViT, SiT, Sinkhorn, PatchMerger; and their losses."""

import itertools
from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.network import Context, Features, Reduced, Reducer, Reduction
from cropr_kernels.tasks import Classifier

ops = torch.ops.cropr


class Distillation(NamedTuple):
    """Weights of the losses against the frozen, unpruned network."""

    logits: float  # of the Kullback-Leibler divergence of the logits
    tokens: float  # of the mean squared error of the tokens after the last norm


class Distilled(Reducer):
    """A reducer whose network is distilled from an unpruned one."""

    distillation: ClassVar[Distillation]

    @abstractmethod
    def token_loss(self, features: Features, expected: Tensor, num_prefix: int) -> Tensor:
        """Loss of the tokens against those (B, N0, D) of the unpruned network."""


class DynamicViT(Distilled):
    """Keep tokens by a predictor that sees the token and the mean of all active ones.

    In training a Gumbel softmax samples, and attention masks pruned tokens, so that gradient
    reaches the predictor; at inference the most probable tokens stay. Loss: squared distance of the
    kept share from its target, weight 2. Source: Rao et al. 2021, section 3.
    """

    distillation = Distillation(logits=0.5, tokens=0.5)
    ratio_weight = 2.0

    def __init__(self, dim: int, num_patches: int, all_patches: int, *, stages: int = 1):
        """Keep num_patches of all_patches; the ratio loss is divided by the number of stages."""
        super().__init__()
        self.ratio = num_patches / all_patches
        self.stages = stages
        self.local = nn.Sequential(nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, dim), nn.GELU())
        widths = [dim, dim // 2, dim // 4]
        hidden = [nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in itertools.pairwise(widths)]
        self.decide = nn.Sequential(*itertools.chain(*hidden), nn.Linear(widths[-1], 2))

    def log_probabilities(self, patches: Tensor, active: Tensor | None) -> Tensor:
        """Log-probabilities (B, N, 2) of keeping and of pruning each token."""
        local, shared = self.local(patches).chunk(2, dim=-1)
        if active is None:
            mean = shared.mean(1, keepdim=True)
        else:
            weight = active.unsqueeze(-1).type_as(shared)  # 0 for masked tokens
            mean = (shared * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)
        return self.decide(torch.cat([local, mean.expand_as(shared)], -1)).float().log_softmax(-1)

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        patches = x[:, num_prefix:]
        active = None if context.active is None else context.active[:, num_prefix:]
        decision = self.log_probabilities(patches, active)
        if not self.training:
            kept_idx, _ = ops.select(F.pad(decision[..., 0], (num_prefix, 0)), num_keep, num_prefix)
            return Reduction(ops.gather(x, kept_idx), kept_idx)
        sampled = F.gumbel_softmax(decision, hard=True)[..., 0]
        active = sampled if active is None else sampled * active
        loss = (active.mean(1) - self.ratio).square().mean()
        active = F.pad(active, (num_prefix, 0), value=1.0)
        return Reduction(x, active=active, loss=self.ratio_weight / self.stages * loss)

    def token_loss(self, features: Features, expected: Tensor, num_prefix: int) -> Tensor:
        if features.active is None:
            raise ValueError("DynamicViT: nothing was masked; its token loss is for training")
        weight = features.active[:, num_prefix:].detach()
        error = (features.tokens - expected)[:, num_prefix:].square().mean(-1)
        return (error * weight).sum() / weight.sum().clamp_min(1)


class Mixer(Reducer):
    """Output patch tokens are means of the input patch tokens with learned weights."""

    @abstractmethod
    def log_weights(self, patches: Tensor) -> Tensor:
        """Logits (B, K, N) of the weights, softmaxed over N."""

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        patches = x[:, num_prefix:]
        weights = self.log_weights(patches).softmax(-1)
        return Reduction(
            torch.cat([x[:, :num_prefix], weights.type_as(x) @ patches], 1), weights=weights
        )


class SiT(Mixer, Distilled):
    """Token slimming: a small MLP of each input token gives its logit for each output token.

    Distilled from the unpruned network: a reverse module rebuilds its tokens from the last ones of
    the slim network. Source: Zong et al. 2022 (Self-slimmed ViT), sections 3.2 and 3.3.
    """

    distillation = Distillation(logits=2.0, tokens=2.0)

    def __init__(self, dim: int, num_patches: int, all_patches: int):
        super().__init__()

        def mlp(outputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.LayerNorm(dim, eps=1e-6),
                nn.Linear(dim, dim // 2),
                nn.GELU(),
                nn.Linear(dim // 2, outputs),
            )

        self.mlp = mlp(num_patches)
        self.scale = nn.Parameter(torch.ones(()))
        self.reverse = mlp(all_patches)
        self.refine = mlp(dim)

    def log_weights(self, patches: Tensor) -> Tensor:
        return (self.mlp(patches) * self.scale).transpose(1, 2).float()

    def token_loss(self, features: Features, expected: Tensor, num_prefix: int) -> Tensor:
        slim = features.tokens[:, num_prefix:]
        rebuilt = self.reverse(slim).transpose(1, 2).float().softmax(-1).type_as(slim) @ slim
        rebuilt = rebuilt + self.refine(rebuilt)
        return F.mse_loss(rebuilt.float(), expected[:, num_prefix:].float())


class Sinkhorn(Mixer):
    """Optimal transport carries tokens to learned centres of unit norm, where they are summed.

    Log-space Sinkhorn rounds on the cosine similarity over epsilon: every centre receives the same
    mass, and every token gives the same. Source: Haurum et al. 2022.
    """

    def __init__(self, dim: int, num_patches: int, *, rounds: int = 3, epsilon: float = 0.1):
        super().__init__()
        self.rounds = rounds
        self.epsilon = epsilon
        self.centres = nn.Parameter(F.normalize(torch.randn(num_patches, dim), dim=-1))

    def log_weights(self, patches: Tensor) -> Tensor:
        centres = F.normalize(self.centres.float(), dim=-1)
        log_plan = centres @ F.normalize(patches.float(), dim=-1).transpose(1, 2) / self.epsilon
        for _ in range(self.rounds):
            log_plan = log_plan.log_softmax(2)  # mass that a centre receives
            log_plan = log_plan.log_softmax(1)  # mass that a token gives
        return log_plan


class PatchMerger(Mixer):
    """Learned queries each take a softmax over the normed tokens. Source: Renggli et al. 2022."""

    def __init__(self, dim: int, num_patches: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.queries = nn.Parameter(torch.empty(num_patches, dim))
        nn.init.trunc_normal_(self.queries, std=dim**-0.5)

    def log_weights(self, patches: Tensor) -> Tensor:
        return (self.queries.type_as(patches) @ self.norm(patches).transpose(1, 2)).float()


class ReducedClassifier(Classifier):
    """A reduced network with the training losses of its method, as a task of `cropr_kernels.train`.

    Args:
        network: its backbone and its reducers become modules of the task.
        teacher: the network before training, for distilled methods; never trained.

    Raises:
        ValueError: the method is distilled, and there is no teacher.
    """

    def __init__(
        self, network: Reduced, smoothing: float = 0.0, *, teacher: nn.Module | None = None
    ):
        super().__init__(network.backbone, smoothing)
        self.reducers = network.reducers
        self.distilled = [
            str(layer)
            for layer, reducer in network.reducers.items()
            if isinstance(reducer, Distilled)
        ]
        if self.distilled and teacher is None:
            name = type(network.reducers[self.distilled[0]]).__name__
            raise ValueError(f"ReducedClassifier: {name} is distilled, and there is no teacher")
        # In a tuple, so that their parameters are counted and saved once, or not at all.
        self.networks = network, None if teacher is None else teacher.eval().requires_grad_(False)

    def forward(self, images: Tensor, target: Tensor | None = None) -> Any:
        """Losses {"main", "aux"} in training with a target, else logits (B, classes)."""
        network, teacher = self.networks
        if not self.training or target is None:
            return network(images)
        features = network.run(images)
        backbone = network.backbone
        logits = backbone.forward_head(features.tokens)
        main = self.criterion(logits, target)
        aux = sum(features.losses, main.new_zeros(()))
        if self.distilled:
            frozen: Any = teacher.to(images.device)  # type: ignore[union-attr]
            with torch.no_grad():
                expected = frozen.forward_features(images)
                teacher_log_probs = frozen.forward_head(expected).float().log_softmax(-1)
            last: Any = self.reducers[self.distilled[-1]]
            divergence = F.kl_div(
                logits.float().log_softmax(-1),
                teacher_log_probs,
                reduction="batchmean",
                log_target=True,
            )
            aux = aux + last.distillation.logits * divergence
            aux = aux + last.distillation.tokens * last.token_loss(
                features, expected, backbone.num_prefix_tokens
            )
        return {"main": main, "aux": aux}

    def predictions(self, images: Tensor) -> list[Tensor]:
        """Return the logits (B, classes) of the output."""
        return [self.networks[0](images)]
