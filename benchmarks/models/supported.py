"""Try to prune every Vision Transformer of timm and every vision architecture of transformers,
small and random.

python -m benchmarks.models.supported [--only TEXT] [--results FILE]

A model is supported if rate 0 gives the outputs of the unpruned model bit for bit, a higher rate
runs, and a deployed model gives the outputs of the functional ops. Whether it merges, calibrates
and runs on the engine, and whether dropping a token equals masking it, is noted beside.
"""

import argparse
import importlib.metadata
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import cropr_kernels as cropr
from benchmarks.models.towers import TOWERS
from benchmarks.models.untried_towers import UNTRIED
from benchmarks.utils.results import RESULTS, Results, environment
from cropr_kernels.models.blocks import SOFTMAX, SizeWeightedAttention
from cropr_kernels.pruning.model import run
from cropr_kernels.pruning.state import PruningOptions
from cropr_kernels.utils.progress import each

# Modules of timm with transformers of one resolution, or what looks like one.
TIMM_MODULES = [
    "beit",
    "cait",
    "convit",
    "crossvit",
    "deepseek_vit",
    "deit",
    "eva",
    "gemma4_vit",
    "hiera",
    "naflexvit",
    "pit",
    "qwen3_vit",
    "tnt",
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "vision_transformer_sam",
    "vitamin",
    "volo",
    "xcit",
]
# Options that make a model of timm small, from the smallest on: constructors take some of them.
_SMALL = (
    {"depth": 4, "embed_dim": 64, "num_heads": 2, "num_classes": 5},
    {"depth": 4, "embed_dim": 64, "num_heads": 2, "num_kv_heads": 1},
    {"depth": 4, "embed_dim": 64, "num_heads": 2},
    {"depth": 4, "num_classes": 5},
    {"depth": 4},
    {},
)


_LARGEST = 300_000_000  # parameters


class Verdict(NamedTuple):
    """Verdict on one model: support by pruning, merging, calibration and the engine."""

    supported: bool
    reason: str  # why not
    engine: str = ""  # "yes", or why not
    merges: str = ""
    calibrates: str = ""
    masking: str = ""  # "yes" if dropping a token is masking it in later blocks


@torch.no_grad()
def check(model: nn.Module, spec: cropr.ModelSpec | None = None) -> Verdict:
    """Try all that pruning does to a model in eval mode; it is left unpruned."""
    try:
        spec = cropr.find_spec(model) if spec is None else spec
    except (TypeError, ValueError) as error:
        return Verdict(False, _sentence(error))
    images = _images_of(spec)
    plain = _outputs(spec, images)
    cropr.apply(model, rate=0, num_outputs=0, spec=spec)
    try:
        unpruned = _outputs(spec, images)
        if not all(map(torch.equal, unpruned, plain)):
            return Verdict(False, "rate 0 gives other outputs than the unpruned model")
        cropr.set_rate(model, _rate(spec))
        expected = _outputs(spec, images)
        masking = _compare_with_masking(model, spec, images)
        if not all(output.isfinite().all() for output in expected if output.is_floating_point()):
            return Verdict(False, "pruned outputs are not finite")
        deployed = cropr.deploy(model)
        if not all(map(_is_close, _outputs(deployed.cropr.spec, images), expected)):
            return Verdict(False, "a deployed model gives other outputs")
        calibrates = _reason(lambda: cropr.calibrate(model, images))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return Verdict(False, _sentence(error))
    finally:
        cropr.remove(model)
    return Verdict(
        True,
        "",
        deployed.cropr.engine_reason or "yes",
        _reason(lambda: _merge(model, spec, images)),
        calibrates,
        masking,
    )


@contextmanager
def _last_outputs(spec: cropr.ModelSpec) -> Iterator[list[Tensor]]:
    """The tokens (B, N, D) that the last block returns."""
    outputs: list[Tensor] = []
    handle = spec.blocks[-1].register_forward_hook(
        lambda block, args, output: outputs.append(spec.token_format.decode(output))
    )
    try:
        yield outputs
    finally:
        handle.remove()


def _compare_with_masking(model: nn.Module, spec: cropr.ModelSpec, images: Tensor) -> str:
    """Compare dropped tokens with tokens that no later block sees: "yes" if they are the same, "no"
    as where heads mix weights with a bias after the softmax, or why they cannot be compared."""
    torch.manual_seed(1)
    takes_maps = spec.map_blocks is not None
    options = PruningOptions(
        maps=frozenset((*spec.map_layers, *[len(spec.blocks) - 1] * takes_maps))
    )
    with _last_outputs(spec) as dropped:
        _, state = run(model, lambda: spec.run(images), options)
    shape = (state.num_images, state.num_tokens)
    last_seen = torch.full(shape, len(spec.blocks))
    for layer, idx in state.pruned_idx:
        last_seen.scatter_(1, idx, layer)
    cropr.set_rate(model, 0)
    forwards = [block.forward for block in spec.blocks]
    calls: list[bool] = []
    try:
        for layer, block in enumerate(spec.blocks):
            log_sizes = torch.zeros(shape).masked_fill(last_seen < layer, -1e4)
            mode: TorchFunctionMode
            if takes_maps:
                window = getattr(block, "window_size", 0)
                mode = MaskedMaps(log_sizes.unflatten(1, spec.grid), window, calls)
            else:
                mode = SizeWeightedAttention(spec.token_format.in_place(log_sizes), calls)
            block.forward = partial(_under, mode, forwards[layer])
        with _last_outputs(spec) as masked:
            _outputs(spec, images)
    except (RuntimeError, ValueError) as error:
        return _sentence(error)
    finally:
        for block in spec.blocks:
            del block.forward
        cropr.set_rate(model, _rate(spec))
    if not calls:
        return "no attention that takes a mask"
    is_kept = last_seen >= len(spec.blocks) - 1
    kept = [
        tokens[is_kept] if tokens.shape[:2] == shape else tokens.flatten(0, 1)
        for tokens in (dropped[0], masked[0])
    ]
    return "yes" if _is_close(*kept) else "no"


class MaskedMaps(TorchFunctionMode):
    """A mode in which attention over windows of maps adds terms (B, height, width) to the logits of
    keys; keys over the edge of the map stay as they are.

    Args:
        terms: of each token.
        window: patches on a side of a window; 0: attention is over the full map.
        calls: receives one entry per attention.
    """

    def __init__(self, terms: Tensor, window: int, calls: list[bool]):
        super().__init__()
        self.calls = calls
        height, width = terms.shape[1:]
        if window:
            terms = F.pad(terms, (0, -width % window, 0, -height % window))
            terms = terms.unfold(1, window, window).unfold(2, window, window)
            self.rows = terms.reshape(-1, window**2)
        else:
            self.rows = terms.flatten(1)

    def _bias(self, logits: Tensor) -> Tensor:
        """Terms for attention over (rows, heads, N, C), or (rows * heads, N, C)."""
        if logits.ndim == 4:
            return self.rows[:, None, None]
        return self.rows.repeat_interleave(len(logits) // len(self.rows), 0).unsqueeze(1)

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            self.calls.append(True)
            mask = kwargs.get("attn_mask")
            bias = self._bias(args[0])
            kwargs["attn_mask"] = bias if mask is None else mask + bias
        elif func in SOFTMAX and args[0].shape[-1] == args[0].shape[-2]:
            self.calls.append(True)
            args = (args[0] + self._bias(args[0]), *args[1:])
        return func(*args, **kwargs)


def _under(
    mode: TorchFunctionMode, forward: Callable[..., object], *args: object, **kwargs: object
) -> object:
    with mode:
        return forward(*args, **kwargs)


def _merge(model: nn.Module, spec: cropr.ModelSpec, images: Tensor) -> None:
    cropr.apply(model, rate=_rate(spec), merge=True, num_outputs=0, spec=spec)
    try:
        _outputs(spec, images)
    finally:
        cropr.remove(model)


def _rate(spec: cropr.ModelSpec) -> int:
    return max((spec.num_scheduled(spec.grid) - spec.num_prefix) // (2 * len(spec.blocks)), 1)


def _images_of(spec: cropr.ModelSpec) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, *spec.image_shape)


def _outputs(spec: cropr.ModelSpec, images: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    return [leaf for leaf in tree_leaves(spec.run(images)) if isinstance(leaf, Tensor)]


def _is_close(output: Tensor, expected: Tensor) -> bool:
    return output.shape == expected.shape and torch.allclose(output, expected, rtol=1e-3, atol=1e-3)


def _reason(function: Callable[[], object]) -> str:
    """Return "yes" if a function runs, else its error."""
    try:
        function()
    except (RuntimeError, ValueError, TypeError) as error:
        return _sentence(error)
    return "yes"


def _sentence(error: Exception) -> str:
    return str(error).partition("\n")[0].removeprefix("cropr.apply: ").removeprefix("cropr: ")


def untried() -> Iterator[tuple[str, Verdict]]:
    """Architectures of transformers that are not tried, and what is in the way."""
    for name, reason in UNTRIED.items():
        yield name, Verdict(False, f"not tried: {reason}")


def timm_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Names of timm's Vision Transformers, and functions that make them."""
    import timm

    for name in timm.list_models():
        if timm.models._registry._model_to_module[name] in TIMM_MODULES:
            yield name, lambda name=name: small_timm_model(name)


def small_timm_model(name: str) -> nn.Module:
    """Make the smallest model of a name that its constructor takes the options for."""
    import timm

    stride = re.search(r"(?:patch|_s|_p)(\d+)", name)
    side = 8 * int(stride.group(1)) if stride else 128
    reason = ""
    for options in _SMALL:
        for size in ({"img_size": side}, {}):
            try:
                with torch.device("meta"):
                    parameters = timm.create_model(name, **options, **size).parameters()
                    count = sum(parameter.numel() for parameter in parameters)
                if count > _LARGEST:
                    reason = f"{count / 1e6:.0f} million parameters"
                    continue
                model = timm.create_model(name, **options, **size).eval()
                height = size.get("img_size", model.pretrained_cfg["input_size"][-1])
                model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, height, height)}
                with torch.no_grad():  # some take options that do not go together
                    model(torch.zeros(1, 3, height, height))
                return model
            # A constructor that takes no such option raises whatever it likes
            except Exception as error:
                reason = str(error)
    raise TypeError(f"no small {name} can be made: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="names that contain it")
    parser.add_argument("--results", type=Path, default=RESULTS / "supported_models.json")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    models: list[tuple[str, str, Callable[[], nn.Module]]] = [
        ("timm", *pair) for pair in timm_models()
    ]
    models += [
        ("transformers", tower.architecture.partition("/")[0], tower.make) for tower in TOWERS
    ]
    versions = {name: importlib.metadata.version(name) for name in ("timm", "transformers")}
    results = Results(options.results, environment("cpu") | versions, keys=("library", "name"))
    makers: dict[tuple[str, str], Any] = {
        (library, name): make for library, name, make in models if options.only in name
    }
    for library, name in each(list(results.remaining(makers)), "models"):
        torch.manual_seed(0)
        try:
            verdict = check(_randomized(makers[library, name]()))
        except TypeError as error:
            verdict = Verdict(False, _sentence(error))
        results.add({"library": library, "name": name, **verdict._asdict()})
    rows = [("transformers", name) for name, _ in untried() if options.only in name]
    verdicts = dict(untried())
    for library, name in results.remaining(rows):
        results.add({"library": library, "name": name, **verdicts[name]._asdict()})


@torch.no_grad()
def _randomized(model: nn.Module) -> nn.Module:
    """Add noise to every parameter, so that none is at its neutral value."""
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


if __name__ == "__main__":
    main()
