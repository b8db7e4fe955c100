"""Queries in closed form: prune a pretrained model without labels and without training.

The score is linear in the token, so the query that best predicts the attention of later blocks to a
token is the solution of one ridge regression per block. Only its normal equations are kept, (D, D)
and (D,) per block, for any number of images.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models.outputs import outputs_of
from .pruning.api import set_rate
from .pruning.deployment import deploy
from .pruning.model import modules_of, require_pruned, warn_of_random_queries
from .pruning.module import Cropr, FoldedCropr
from .pruning.observing import observe_blocks, windows_of
from .pruning.options import write_to_config
from .query_files import mark_calibrated, set_queries
from .thresholds import Sample, fit_thresholds
from .utils.flops import flop_counter

Model = TypeVar("Model", bound=nn.Module)
# (images, C, H, W), or batches, or tuples that start with one
Images = Tensor | Iterable[Tensor | Sequence[Any]]


def ranks(values: Tensor) -> Tensor:
    """Rank of each value in its row, from 0 to 1, minus one half."""
    order = values.argsort(dim=1, stable=True).argsort(dim=1)
    return order.double() / max(values.shape[1] - 1, 1) - 0.5


def _batches(images: Images, batch_size: int) -> Iterator[Tensor]:
    for batch in images.split(batch_size) if isinstance(images, Tensor) else images:
        yield batch if isinstance(batch, Tensor) else batch[0]


@torch.no_grad()
def calibrate(
    model: Model, images: Images, *, ridge: float = 1e-2, batch_size: int = 32, **kwargs: object
) -> Model:
    """Set the queries of a pruned model in closed form, from unlabelled images and without
    training.

    For the module after block l: least squares from the patch tokens that leave block l of the
    unpruned model, centered per image (or window), to the attention of the later blocks
    to them (`importance`, averaged over those blocks, as a rank).
    Deterministic: the same images in the same order result in the same bits. The folded queries
    have norm 1; one calibrated model serves all rates. If it merges, and the engine runs it, also
    the thresholds by which deployed copies merge, from the first 128 images.

    Args:
        model: pruned by `apply`; its backbone is only read.
        images: (images, C, H, W), preprocessed as for inference, or an iterable of such batches, or
            of tuples that start with one (a DataLoader). A few hundred are enough.
        ridge: regularization, as a share of the mean squared channel.
        batch_size: images at a time if `images` is one tensor.
        kwargs: further arguments of the model.

    Returns:
        The same model.

    Raises:
        TypeError: the model is not pruned.
        ValueError: there are no images, ridge is not positive, or a block does not call attention
            once.
    """
    modules = require_pruned(model, "cropr.calibrate")
    if not all(isinstance(module, Cropr | FoldedCropr) for module in modules):
        raise ValueError(
            f"cropr.calibrate: sets the queries of Cropr modules, got {type(modules[0]).__name__}"
        )
    if not ridge > 0:
        raise ValueError(f"cropr.calibrate: ridge must be positive, got {ridge}")
    equations = _NormalEquations(len(modules), modules.spec.dim, next(model.parameters()).device)
    sample = Sample()
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(images, batch_size):
            equations.add(model, batch, kwargs)
            sample.add(batch)
    finally:
        model.train(was_training)
    if equations.num_images == 0:
        raise ValueError("cropr.calibrate: needs at least one image, got none")
    set_queries(modules, F.normalize(equations.solve(ridge), dim=1))
    mark_calibrated(modules, "track_parent")
    modules.thresholds = fit_thresholds(model, sample.images().to(equations.gram.device), kwargs)
    write_to_config(model)
    return model


class _NormalEquations:
    """The least squares of all modules, from tokens to the attention of later blocks."""

    def __init__(self, num_modules: int, dim: int, device: torch.device):
        self.gram = torch.zeros(num_modules, dim, dim, dtype=torch.float64, device=device)
        self.moment = torch.zeros(num_modules, dim, dtype=torch.float64, device=device)
        self.num_images = 0

    def add(self, model: nn.Module, images: Tensor, kwargs: Mapping[str, object]) -> None:
        """Add the tokens of a batch."""
        images = images.to(self.gram.device)
        tokens, importances = observe_blocks(model, images, kwargs)
        windows = windows_of(modules_of(model), images)
        for layer in range(len(self.gram)):
            later = torch.stack(importances[layer + 1 :]).mean(0)
            for cells in windows:
                target = ranks(later[:, cells].flatten(0, -2))
                rows = tokens[layer][:, cells].flatten(0, -3).double()
                rows = rows - rows.mean(1, keepdim=True)
                self.gram[layer] += torch.einsum("bnd,bne->de", rows, rows)
                self.moment[layer] += torch.einsum("bnd,bn->d", rows, target)
        self.num_images += len(images)

    def solve(self, ridge: float) -> Tensor:
        """Queries (modules, D)."""
        return torch.stack(
            [
                solve_ridge(layer, *pair, ridge)
                for layer, pair in enumerate(zip(self.gram, self.moment))
            ]
        )


def solve_ridge(layer: int, gram: Tensor, moment: Tensor, ridge: float) -> Tensor:
    """Solve (gram + ridge * its mean diagonal) q = moment by Cholesky; warn if float64 needs a
    stronger ridge."""
    mean = gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    for stronger in (ridge * 10**power for power in range(12)):
        matrix = gram + stronger * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor, info = torch.linalg.cholesky_ex(matrix)
        query = torch.cholesky_solve(moment.unsqueeze(1), factor).squeeze(1)
        if not info and (matrix @ query - moment).norm() <= 1e-6 * moment.norm():
            if stronger > ridge:
                warnings.warn(
                    f"cropr.calibrate: block {layer} needed a ridge of {stronger:g}", stacklevel=3
                )
            return query
    raise ValueError(f"cropr.calibrate: the tokens after block {layer} are not finite")


class Agreement(NamedTuple):
    """The agreement of a model at one rate with the unpruned model."""

    rate: int
    agreement: float  # share of images with the same top class; of features the mean cosine
    # Mean KL divergence from the unpruned model's probabilities; NaN for features
    divergence: float
    flops: float  # times fewer than unpruned, on average


@torch.inference_mode()
def agreement(
    model: nn.Module,
    images: Images,
    rates: Iterable[int],
    *,
    batch_size: int = 32,
    **kwargs: object,
) -> list[Agreement]:
    """Compare a pruned model at several rates with the same model unpruned, without labels.

    Args:
        model: pruned by `apply`, with logits (B, classes) or features (B, D) as its output, or a
            Hugging Face output that holds them; it is read only.
        images: as in `calibrate`; others than it was calibrated on.
        rates: tokens dropped per module.
        batch_size: images at a time if `images` is one tensor.
        kwargs: further arguments of the model.

    Raises:
        TypeError: the model is not pruned.
        ValueError: there are no images, or a rate drops more tokens than there are.
    """
    classifies = require_pruned(model, "cropr.agreement").spec.num_classes > 0
    warn_of_random_queries(model, "cropr.agreement", 4)
    deployed = deploy(model)
    device = next(model.parameters()).device
    rates = [*rates]
    flops: Counter[int] = Counter()
    outputs: dict[int, list[Tensor]] = {}
    for batch in _batches(images, batch_size):
        for rate in dict.fromkeys((0, *rates)):
            spec = modules_of(set_rate(deployed, rate)).spec
            with flop_counter() as counter:
                output = outputs_of(spec.run(batch.to(device), **kwargs)).double()
            outputs.setdefault(rate, []).append(output)
            flops[rate] += counter.get_total_flops()
    if not outputs:
        raise ValueError("cropr.agreement: needs at least one image, got none")
    unpruned = torch.cat(outputs[0])
    return [
        Agreement(
            rate,
            *compare_outputs(torch.cat(outputs[rate]), unpruned, classifies),
            flops[0] / flops[rate],
        )
        for rate in rates
    ]


def compare_outputs(pruned: Tensor, unpruned: Tensor, classifies: bool) -> tuple[float, float]:
    """Agreement and divergence of outputs (B, classes) or (B, D)."""
    if not classifies:
        return F.cosine_similarity(unpruned, pruned).mean().item(), math.nan
    divergence = F.kl_div(
        pruned.log_softmax(1), unpruned.log_softmax(1), reduction="batchmean", log_target=True
    )
    return (unpruned.argmax(1) == pruned.argmax(1)).double().mean().item(), divergence.item()


def recommend(rows: Iterable[Agreement], minimum: float = 0.95) -> Agreement | None:
    """Return the highest rate with at least this agreement, or None."""
    return max(
        (row for row in rows if row.agreement >= minimum), key=lambda row: row.rate, default=None
    )
