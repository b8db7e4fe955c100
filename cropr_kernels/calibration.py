"""Queries in closed form: prune a pretrained model without labels and without training.

The score is linear in the token, so the query that best predicts how much later blocks will attend to a token is the
solution of one ridge regression per block. Only its normal equations are kept, (D, D) and (D,) per block, however
many images stream past.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .models.outputs import outputs_of
from .pruning.api import deploy, options_of, set_rate
from .pruning.fusion import Fusion, Restore
from .pruning.model import require_pruned, run, warn_of_random_queries
from .pruning.module import Cropr, FoldedCropr
from .pruning.state import PruningOptions
from .schedule import SCHEDULES
from .utils.flops import flop_counter
from .utils.io import atomic_write, load_safetensors
from .utils.optional import import_optional


class _AttentionInputs(TorchFunctionMode):
    """Records the queries and keys (B, heads, N, C) of every scaled_dot_product_attention and nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key"), args)) | (kwargs or {})
            self.seen.append((named["query"], named["key"]))
        elif func is F.multi_head_attention_forward:  # what it calls is out of a mode's sight
            query, key, _, dim, num_heads, weight, bias = args[:7]  # (N, B, D)
            parts = ((query, slice(0, dim)), (key, slice(dim, 2 * dim)))
            q, k = (F.linear(x, weight[rows], None if bias is None else bias[rows]) for x, rows in parts)
            self.seen.append(tuple(x.unflatten(2, (num_heads, -1)).permute(1, 2, 0, 3) for x in (q, k)))
        return func(*args, **(kwargs or {}))


def importance(query: Tensor, key: Tensor, num_prefix: int, *, class_token: bool) -> Tensor:
    """How much the output attends to each patch: (B, patches) float32, each row sums to one.

    Attention probabilities, averaged over heads and over the tokens that the head pools: the first with a class token,
    else all patches, those behind the P = num_prefix first tokens. Query and key are (B, heads, N, C), as they enter
    the attention, rotary positions applied.
    """
    pooled = query[:, :, :1] if class_token else query[:, :, num_prefix:]
    scale = query.shape[-1] ** -0.5
    # An image at a time: for the patches' own queries this is the whole attention matrix.
    images = zip(pooled.float(), key.float().transpose(-2, -1))
    share = torch.stack([(q @ k * scale).softmax(-1).mean((0, 1)) for q, k in images])[:, num_prefix:]
    return share / share.sum(1, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)


def _ranks(values: Tensor) -> Tensor:
    """Rank of each value in its row, from 0 to 1, minus one half."""
    order = values.argsort(dim=1, stable=True).argsort(dim=1)
    return order.double() / max(values.shape[1] - 1, 1) - 0.5


def _observe(model: Any, images: Tensor, see: Callable[[Tensor, Tensor, Tensor], None], kwargs: dict) -> None:
    """Run the unpruned model; after each block see(its tokens (B, N, D), the query and key of its attention)."""
    spec, fast_path = model.cropr.spec, torch.backends.mha.get_fastpath_enabled()
    with _AttentionInputs() as attention:

        def record(layer: int, x: Tensor) -> None:
            if len(attention.seen) != 1:
                raise ValueError(
                    f"cropr.calibrate: block {layer} must call scaled_dot_product_attention once, called it "
                    f"{len(attention.seen)} times (timm: set fused attention; transformers: attn_implementation='sdpa')"
                )
            see(x, *attention.seen.pop())

        handle = spec.blocks[0].register_forward_pre_hook(lambda block, args: attention.seen.clear())
        torch.backends.mha.set_fastpath_enabled(False)  # it would compute the attention elsewhere
        try:
            run(model, lambda: spec.tower(images, **kwargs), PruningOptions(observe=record))
        finally:
            handle.remove()
            torch.backends.mha.set_fastpath_enabled(fast_path)


def _batches(images: Tensor | Iterable[Any], batch_size: int) -> Iterator[Tensor]:
    for batch in images.split(batch_size) if isinstance(images, Tensor) else images:
        yield batch[0] if isinstance(batch, tuple | list) else batch


@torch.no_grad()
def calibrate(
    model: Any, images: Tensor | Iterable[Any], *, ridge: float = 1e-2, batch_size: int = 32, **kwargs: Any
) -> Any:
    """Set the queries of a pruned model in closed form, from unlabelled images and without training.

    For the module after block l: least squares from the patch tokens that leave block l of the unpruned model, centred
    per image, to how much the later blocks attend to them (`importance`, averaged over those blocks, as a rank).
    Deterministic: the same images in the same order give the same bits. The folded queries have norm 1; the rates stay
    free: one calibrated model serves them all.

    Args:
        model: pruned by `apply`, with attention through scaled_dot_product_attention; its backbone is only read.
        images: (images, C, H, W), preprocessed as for inference, or an iterable of such batches, or of tuples that
            start with one (a DataLoader). A few hundred are enough.
        ridge: regularisation, as a share of the mean squared channel.
        batch_size: images at a time where `images` is one tensor.
        kwargs: what else the model is called with.

    Returns:
        The same model.

    Raises:
        TypeError: the model is not pruned.
        ValueError: there are no images, ridge is not positive, or a block has no attention to look at.
    """
    stack: Any = require_pruned(model, "cropr.calibrate")
    if stack.config.windows is not None:
        raise ValueError("cropr.calibrate: models with window attention are not supported")
    if not all(isinstance(module, Cropr | FoldedCropr) for module in stack):
        raise ValueError(f"cropr.calibrate: sets the queries of Cropr modules, got {type(stack[0]).__name__}")
    if not ridge > 0:
        raise ValueError(f"cropr.calibrate: ridge must be positive, got {ridge}")
    spec, prefix, device = stack.spec, stack.spec.num_prefix, next(model.parameters()).device
    gram = torch.zeros(len(stack), spec.dim, spec.dim, dtype=torch.float64, device=device)
    moment = torch.zeros(len(stack), spec.dim, dtype=torch.float64, device=device)
    tokens: list[Tensor] = []
    attended: list[Tensor] = []

    def see(x: Tensor, query: Tensor, key: Tensor) -> None:
        tokens.append(x[:, prefix:])
        attended.append(importance(query, key, prefix, class_token=spec.class_token))

    count, was_training = 0, model.training
    model.eval()
    try:
        for batch in _batches(images, batch_size):
            _observe(model, batch.to(device), see, kwargs)
            for layer in range(len(stack)):
                target = _ranks(torch.stack(attended[layer + 1 :]).mean(0))
                rows = tokens[layer].double()
                rows = rows - rows.mean(1, keepdim=True)
                gram[layer] += torch.einsum("bnd,bne->de", rows, rows)
                moment[layer] += torch.einsum("bnd,bn->d", rows, target)
            tokens.clear()
            attended.clear()
            count += len(batch)
    finally:
        model.train(was_training)
    if count == 0:
        raise ValueError("cropr.calibrate: needs at least one image, got none")
    solutions = [_solve(layer, *normal, ridge) for layer, normal in enumerate(zip(gram, moment))]
    _set_queries(stack, F.normalize(torch.stack(solutions), dim=1))
    _settle_fusion(stack, "host")
    return model


def _settle_fusion(stack: Any, restore: Restore) -> None:
    """How a network restores tokens whose queries are calibrated, where nothing says how: it never saw old tokens."""
    stack.calibrated = True
    if stack.config.llf is not None:
        stack.config = replace(stack.config, llf=stack.config.llf.by_default(restore))


def _solve(layer: int, gram: Tensor, moment: Tensor, ridge: float) -> Tensor:
    """(gram + ridge * its mean diagonal) q = moment, by Cholesky; a ridge too weak for float64 is raised, and said."""
    mean = gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    for stronger in (ridge * 10**power for power in range(12)):
        matrix = gram + stronger * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor, info = torch.linalg.cholesky_ex(matrix)
        query = torch.cholesky_solve(moment.unsqueeze(1), factor).squeeze(1)
        if not info and (matrix @ query - moment).norm() <= 1e-6 * moment.norm():
            if stronger > ridge:
                warnings.warn(f"cropr.calibrate: block {layer} needed a ridge of {stronger:g}", stacklevel=3)
            return query
    raise ValueError(f"cropr.calibrate: the tokens after block {layer} are not finite")


def _set_queries(stack: Any, queries: Tensor) -> None:
    """Fold to these from now on, one row per module."""
    for module, query in zip(stack, queries):
        if isinstance(module, FoldedCropr):
            module.folded.copy_(query)
        elif module.queries.shape[0] == 1:
            module.queries.copy_(query)
        else:
            # Several queries stay apart, as their auxiliary predictions need it; their sum is what scores.
            module.queries.add_(query / module.queries.shape[0] - module.queries.mean(0))


def save_queries(model: Any, path: str | Path, about: dict[str, Any] | None = None) -> None:
    """Write the folded queries of a pruned model, (modules, D) float32, and how it is pruned: safetensors.

    The commands prune as the file says: by its schedule, merging and fusion. `about` adds to that, or replaces it.

    Raises:
        TypeError: the model is not pruned.
        OSError: the file cannot be written.
        ImportError: safetensors is not installed.
    """
    stack: Any = require_pruned(model, "cropr.save_queries")
    write = import_optional("safetensors.torch", "demo", "cropr.save_queries").save_file
    how = {name: own for name, own in (options_of(stack) or {}).items() if name in (*SCHEDULES, "llf", "merge")}
    queries, text = (
        torch.stack([module.query().cpu() for module in stack]),
        json.dumps(how | (about or {}), sort_keys=True),
    )
    with atomic_write(path) as temporary:
        write({"queries": queries}, temporary, {"about": text, "sha256": _checksum(queries, text)})


def _checksum(queries: Tensor, about: str) -> str:
    return hashlib.sha256(queries.numpy().tobytes() + about.encode()).hexdigest()


def read_queries(path: str | Path) -> tuple[Tensor, dict[str, Any]]:
    """The queries (modules, D) in a file, and what is said about them; errors are those of `load_queries`."""
    if Path(path).is_dir():
        raise ValueError(f"cropr.load_queries: {path} is a folder, not a file of cropr calibrate or cropr.save_queries")
    try:
        tensors, metadata = load_safetensors(path)
        why = "" if "queries" in tensors and "about" in metadata else f"it has {', '.join([*tensors][:3]) or 'nothing'}"
    except ValueError:
        why = "it is no safetensors file, or damaged"
    if why:
        give = "give one that cropr calibrate or cropr.save_queries wrote"
        raise ValueError(f"cropr.load_queries: {path} holds no queries: {why}; {give}")
    queries, about = tensors["queries"], metadata["about"]
    if metadata.get("sha256") != _checksum(queries, about):
        raise ValueError(f"cropr.load_queries: {path} is damaged: its checksum does not match; calibrate or copy again")
    if queries.ndim != 2 or queries.dtype != torch.float32 or not queries.isfinite().all():
        raise ValueError(
            f"cropr.load_queries: queries must be finite, float32 and (modules, D), {path} holds {queries.dtype} "
            f"{tuple(queries.shape)}"
        )
    return queries, json.loads(about)


@torch.no_grad()
def load_queries(model: Any, path: str | Path) -> Any:
    """Set the queries of a pruned model to those that `save_queries` or `cropr calibrate` wrote, in place.

    A model with Last Layer Fusion has one module fewer, and takes the first ones. How the model is pruned stays; where
    llf=True left it open, tokens are restored as the file says.

    Returns:
        The same model.

    Raises:
        TypeError: the model is not pruned.
        FileNotFoundError: there is no such file.
        ValueError: it holds no queries, is damaged, or the queries are those of another model.
        ImportError: safetensors is not installed.
    """
    stack: Any = require_pruned(model, "cropr.load_queries")
    queries, about = read_queries(path)
    dim = len(stack[0].query())
    if len(queries) < len(stack) or queries.shape[1] != dim:
        raise ValueError(
            f"cropr.load_queries: the model has {len(stack)} modules of width {dim}, {path} queries of shape "
            f"{tuple(queries.shape)}; calibrate this model"
        )
    _set_queries(stack, queries.to(next(model.parameters()).device))
    said = Fusion.of(about.get("llf"))
    _settle_fusion(stack, "host" if said is None else said.restore or "left")
    return model


class Agreement(NamedTuple):
    """What a rate leaves of the unpruned model's answers."""

    rate: int
    agreement: float  # share of images with the same top class; of features the mean cosine
    divergence: float  # mean KL divergence from the unpruned model's probabilities; NaN for features
    flops: float  # times fewer than unpruned


@torch.inference_mode()
def agreement(
    model: Any, images: Tensor | Iterable[Any], rates: Iterable[int], *, batch_size: int = 32, **kwargs: Any
) -> list[Agreement]:
    """Compare a pruned model at several rates with the same model unpruned, without labels.

    Args:
        model: pruned by `apply`, with logits (B, classes) or features (B, D) as its output, or a transformers output
            that holds them; it is read only.
        images: as in `calibrate`; others than it was calibrated on.
        rates: tokens dropped per module.
        batch_size: images at a time where `images` is one tensor.
        kwargs: what else the model is called with.

    Raises:
        TypeError: the model is not pruned.
        ValueError: there are no images, or a rate drops more tokens than there are.
    """
    classifies = require_pruned(model, "cropr.agreement").spec.num_classes > 0
    warn_of_random_queries(model, "cropr.agreement", 4)
    fast, device = deploy(model), next(model.parameters()).device
    rates, flops = [*rates], dict[int, int]()
    outputs: dict[int, list[Tensor]] = {}
    for batch in _batches(images, batch_size):
        for rate in dict.fromkeys((0, *rates)):
            tower = set_rate(fast, rate).cropr.spec.tower
            with nullcontext() if rate in flops else flop_counter() as counter:
                output = outputs_of(tower(batch.to(device), **kwargs)).double()
            outputs.setdefault(rate, []).append(output)
            if counter is not None:
                flops[rate] = counter.get_total_flops()
    if not outputs:
        raise ValueError("cropr.agreement: needs at least one image, got none")
    expected, rows = torch.cat(outputs[0]), []
    for rate in rates:
        own = torch.cat(outputs[rate])
        if classifies:
            divergence = F.kl_div(own.log_softmax(1), expected.log_softmax(1), reduction="batchmean", log_target=True)
            same = (expected.argmax(1) == own.argmax(1)).double().mean()
        else:
            same, divergence = F.cosine_similarity(expected, own).mean(), torch.tensor(float("nan"))
        rows.append(Agreement(rate, same.item(), divergence.item(), flops[0] / flops[rate]))
    return rows


def recommend(rows: Iterable[Agreement], least: float = 0.95) -> Agreement | None:
    """The highest rate that agrees with the unpruned model at least so much, or None."""
    return max((row for row in rows if row.agreement >= least), key=lambda row: row.rate, default=None)
