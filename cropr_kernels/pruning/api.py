"""apply, remove, set_rate, deploy: prune an existing model in place, and undo it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ..models.adapters import ModelSpec, find_spec
from ..models.outputs import num_classes_of
from ..models.packed_linear import unpack
from ..schedule import Schedule, num_modules
from .block_wrapper import links_to, unwrap, wrap
from .budget import Thresholds
from .config import PruningConfig
from .fusion import Fusion, Restore
from .graphs import GraphedForward
from .merging import Merge
from .model import (
    CroprModules,
    after_encoder,
    after_forward,
    after_norm,
    before_encoder,
    before_forward,
    is_pruned,
    keep_grid,
    modules_of,
    require_pruned,
    warn_of_random_queries,
)
from .module import Cropr, FoldedCropr, Scorer
from .options import write_to_config
from .replaced import replace_attributes, restore_attributes, switch_off_random
from .windows import Windows

Model = TypeVar("Model", bound=nn.Module)


def apply(
    model: Model,
    *,
    rate: int | None = None,
    keep: Sequence[int] | str | Path | None = None,
    ratio: float | None = None,
    const: tuple[int, int] | None = None,
    llf: bool | Restore | Fusion = False,
    merge: bool | Merge = False,
    windows: Windows | None = None,
    img_size: tuple[int, int] | None = None,
    num_queries: int = 1,
    num_outputs: int | None = None,
    make_module: Callable[[int, nn.Module], Scorer] | None = None,
    spec: ModelSpec | None = None,
) -> Model:
    """Put Cropr modules between the blocks of a model, in place.

    The model keeps its class, its forward, its parameters and all its outputs; `model.cropr` is
    added, one module per pruned block. In training model(images) returns (output, auxiliary
    predictions), if there are any; a Hugging Face model its own output, with the predictions as
    `aux`, and given labels with their losses in its loss. It also takes two masks, (B, grid height,
    grid width) bool: `protect`, patches that are kept while anything else can be pruned
    (`protect_boxes`; of too many, scores decide), and `padding`, positions that hold no patch
    (`pad_images`): they are pruned first, and nothing sees them; each image needs one that is none.

    With `llf` the tokens after the last block are all tokens in order, without it those kept.

    Args:
        model: a Vision Transformer of timm, Hugging Face, torchvision or this package, or any other
            whose blocks are called one after the other with tokens (B, N, D) or maps: see
            `find_spec`.
        rate, keep, ratio, const: the schedule; exactly one, see `Schedule`. keep may be a file that
            `cropr tune` wrote.
        llf: Last Layer Fusion: all tokens are restored before the last block; "as_pruned", as
            published, or "track_parent", with the change of their parent since; or a `Fusion`.
        merge: pruned tokens merge into kept ones: best for a model that was not trained to be
            pruned. Outputs cover all positions: a merged token is copied to all that it stands for.
            True is `Merge()`.
        windows: window attention for a model without; every window prunes equally many, so
            schedules count the tokens of one. Needs llf. Class token and registers are left out,
            and the model returns features (B, patches, D) only.
        img_size: height and width in pixels that the schedule is for; default the model's own.
            Other sizes still run.
        num_queries: M, 1 for classification, one per patch for dense tasks (with windows: per patch
            of a window).
        num_outputs: width of the auxiliary predictions, default the model's classes; 0 for none, as
            for a model that is only calibrated, or over maps: queries then do not learn, and the
            model returns its plain output in training too.
        make_module: called as make_module(layer, block) for the module after each pruned block, in
            place of `Cropr`: any module with the methods of `Scorer`.
        spec: the specification of a model; default `find_spec(model)`.

    Returns:
        The same model.

    Raises:
        TypeError: the model cannot be pruned; the message is the reason.
        ValueError: the model is pruned already, the schedule does not fit it, modules for merging
            have no query, or windows come without llf, or for a model that has its own or returns
            tokens only through its head.
    """
    if is_pruned(model):
        raise ValueError(
            "cropr.apply: the model is pruned already; cropr.set_rate changes the rate, "
            "cropr.remove undoes"
        )
    spec = find_spec(model) if spec is None else spec
    if spec.num_classes:
        spec = replace(spec, num_classes=num_classes_of(model, spec.num_classes))
    if spec.map_blocks is not None and (windows is not None or num_outputs):
        raise ValueError(
            f"cropr.apply: {type(model).__name__} takes neither windows, as it has its own, nor "
            "auxiliary predictions: num_outputs must be 0"
        )
    if windows is not None and not hasattr(model, "forward_features"):
        raise ValueError(
            "cropr.apply: windows are for timm models and cropr_kernels.ViT, got "
            f"{type(model).__name__}"
        )
    fusion = _fusion_of(llf, spec, "track_parent" if merge else None)
    config = PruningConfig(
        Schedule(rate, keep, ratio, const),
        fusion,
        (merge if isinstance(merge, Merge) else Merge()) if merge else None,
        windows,
        spec.grid if img_size is None else spec.grid_of(img_size),
    )
    _require_fusion_of_windows(config, "cropr.apply")
    _check_schedule(config, spec)
    if make_module is None:
        make_module = partial(
            _make_cropr,
            spec.dim,
            _num_outputs_of(spec) if num_outputs is None else num_outputs,
            num_queries,
        )
    count = num_modules(len(spec.blocks), config.full_blocks)
    modules = CroprModules(
        [make_module(layer, spec.blocks[layer]) for layer in range(count)], config, spec
    )
    if config.merge is not None and not modules.selects_by_query:
        raise ValueError(
            f"cropr.apply: merge selects by queries, and {type(modules[0]).__name__} does not"
        )
    _match_parameters(modules, spec.blocks[0])
    model.cropr = modules.train(model.training)
    replace_attributes(modules)
    modules.hooks = [
        model.register_forward_pre_hook(before_forward, with_kwargs=True),
        model.register_forward_hook(after_forward, with_kwargs=True, always_call=True),
    ]
    if spec.encoder is not model:
        modules.hooks += [
            spec.encoder.register_forward_pre_hook(
                partial(before_encoder, modules), with_kwargs=True
            ),
            spec.encoder.register_forward_hook(partial(after_encoder, modules), always_call=True),
        ]
    if spec.projection is not None:
        modules.hooks.append(spec.projection.register_forward_hook(partial(keep_grid, modules)))
    if spec.norm is not None:
        modules.hooks.append(spec.norm.register_forward_hook(partial(after_norm, modules)))
    modules.links = links_to(spec.blocks, model)
    wrap(spec.blocks, modules)
    write_to_config(model)
    return model


def _num_outputs_of(spec: ModelSpec) -> int:
    return spec.num_classes if spec.map_blocks is None else 0


def _make_cropr(
    dim: int, num_outputs: int, num_queries: int, layer: int, block: nn.Module
) -> Cropr:
    return Cropr(dim, num_outputs, num_queries)


def _match_parameters(modules: CroprModules, block: nn.Module) -> None:
    """Move modules to the device and dtype of a block."""
    for parameter in block.parameters():
        if parameter.is_floating_point() and not parameter.is_meta:
            modules.to(parameter.device, parameter.dtype)
            return


def apply_options(model: Model, options: dict[str, Any]) -> Model:
    """Apply the options that `options_of` returned, from a file."""
    options = dict(options)
    thresholds = Thresholds.from_saved(options.pop("thresholds", None))
    merge = options.get("merge")
    windows = options.get("windows")
    values = {
        "llf": Fusion.from_saved(options.get("llf")) or False,
        "merge": Merge(**merge) if merge else False,
        "windows": Windows(windows["size"], tuple(windows["global_blocks"])) if windows else None,
    }
    apply(model, **options | values)
    modules_of(model).thresholds = thresholds
    write_to_config(model)
    return model


def _fusion_of(
    llf: bool | Restore | Fusion, spec: ModelSpec, restore: Restore | None
) -> Fusion | None:
    """Return the fusion that `llf` stands for; without one, a model that needs all patches gets
    them after the end."""
    fusion = Fusion.of(llf)
    if fusion is None:
        return Fusion(blocks=0) if spec.needs_map or spec.map_layers else None
    return fusion if restore is None else fusion.with_default(restore)


def _require_fusion_of_windows(config: PruningConfig, caller: str) -> None:
    if config.windows is not None and config.llf is None:
        raise ValueError(f"{caller}: windows need llf=True, so that the map is full again")


def _check_schedule(config: PruningConfig, spec: ModelSpec) -> None:
    """Raise ValueError if the schedule does not fit the image size of apply."""
    config.counts(spec.num_scheduled(config.grid), len(spec.blocks), spec.num_prefix)


def remove(model: Model) -> Model:
    """Undo `apply` in place: restore classes, hooks, parameters and stochastic depth.

    Raises:
        TypeError: the model is not pruned.
    """
    modules = require_pruned(model, "cropr.remove")
    restore_attributes(modules)
    if GraphedForward.of(model) is not None:
        del model.forward
    for hook in modules.hooks:
        hook.remove()
    unwrap(modules.spec.blocks)
    unpack(modules.linear_layers)
    del model.cropr
    config: Any = getattr(model, "config", None)
    if hasattr(config, "cropr"):
        del config.cropr
    return model


def set_rate(model: Model, rate: int) -> Model:
    """Set another rate, in place: one model serves many.

    Raises:
        TypeError: the model is not pruned.
        ValueError: the rate drops more tokens than there are at the image size of apply.
    """
    modules = require_pruned(model, "cropr.set_rate")
    config = replace(modules.config, schedule=Schedule(rate=rate))
    _check_schedule(config, modules.spec)
    modules.config = config
    write_to_config(model)
    if isinstance(modules[0], FoldedCropr):
        warn_of_random_queries(model, "cropr.set_rate")
    return model


def set_llf(model: Model, llf: bool | Restore | Fusion) -> Model:
    """Set another restoration of pruned tokens, in place, or none: `llf` as in `apply`.

    Raises:
        TypeError: the model is not pruned.
        ValueError: it has too few modules, as one that was pruned with fusion over more blocks.
    """
    modules = require_pruned(model, "cropr.set_llf")
    tracks = modules.config.merge is not None or modules.calibrated
    fusion = _fusion_of(llf, modules.spec, "track_parent" if tracks else "as_pruned")
    config = replace(modules.config, llf=fusion)
    _require_fusion_of_windows(config, "cropr.set_llf")
    needed = num_modules(len(modules.spec.blocks), config.full_blocks)
    if needed > len(modules):
        raise ValueError(
            f"cropr.set_llf: llf={llf!r} needs {needed} modules, and the model has "
            f"{len(modules)}; cropr.remove it and "
            "apply anew"
        )
    _check_schedule(config, modules.spec)
    modules.config = config
    switch_off_random(modules)
    write_to_config(model)
    return model


def set_progress(model: Model, share: float) -> Model:
    """Prune only this share of what the schedule prunes, in place: the curriculum of a training
    run.

    Args:
        model: pruned by `apply`.
        share: from 0, nothing, to 1, all.

    Raises:
        TypeError: the model is not pruned.
        ValueError: share is outside [0, 1].
    """
    modules = require_pruned(model, "cropr.set_progress")
    modules.config = replace(modules.config, schedule=replace(modules.config.schedule, share=share))
    return model
