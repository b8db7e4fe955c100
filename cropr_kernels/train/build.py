"""Building of the network that a configuration trains."""

from typing import Any

import torch

from ..models.adapters import find_spec
from ..models.factory import create_model, load_weights, model_source
from ..pruning.api import apply
from ..pruning.fusion import Fusion
from ..pruning.windows import Windows
from ..tasks import Classifier, Detector, Segmenter, Task
from ..tasks.backbone import Backbone
from . import checkpoint
from .config import Config


def backbone(config: Config, num_classes: int) -> Backbone:
    """Create the network before pruning, with a head for num_classes, without one for 0."""
    options: dict[str, Any] = {"num_classes": num_classes, "drop_path_rate": config.drop_path}
    options |= {
        name: getattr(config, name)
        for name in ("patch_size", "global_pool")
        if getattr(config, name)
    }
    options |= config.options_of("model_options")
    name = config.weights or config.model
    source = model_source(name, pretrained=config.pretrained)
    if source not in ("preset", "timm", "weight file"):
        raise ValueError(
            f"config: model must be a preset of cropr_kernels or a timm model, got {name!r}"
        )
    if source == "timm":
        options |= {"img_size": config.img_size, "dynamic_img_size": True}
    model: Backbone = create_model(name, pretrained=config.pretrained, **options)
    find_spec(model)
    if config.weights:
        checkpoint.reject_nan(model.state_dict(), config.weights)
    model.set_grad_checkpointing(config.grad_checkpointing)
    return model.train()


def resolve_config(config: Config) -> Config:
    """Return the configuration with the model name that its weight file holds, if it has one."""
    return (
        config.changed(model=load_weights(config.weights)[1]["name"]) if config.weights else config
    )


def task(config: Config, num_classes: int) -> Task:
    """Create the task of a configuration around a pruned backbone.

    Raises ValueError if options do not fit together.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = backbone(config, num_classes if config.task == "classification" else 0)
        patch = model.patch_embed.patch_size
        grid = config.img_size[0] // patch[0], config.img_size[1] // patch[1]
        windows = Windows(config.window, config.global_blocks) if config.window else None
        if config.prunes or windows:
            per_patch = config.window**2 if windows else grid[0] * grid[1]
            schedule = config.schedule if config.prunes else {"rate": 0}
            apply(
                model,
                **schedule,
                llf=Fusion(config.restore) if config.llf or windows else False,
                merge=config.merge,
                windows=windows,
                img_size=config.img_size,
                num_queries=config.num_queries if config.task == "classification" else per_patch,
                num_outputs=num_classes if config.prunes and not config.fixed_queries else 0,
            )
        if config.task == "classification":
            return Classifier(model, config.smoothing)
        if config.task == "segmentation":
            return Segmenter(model, num_classes, grid=grid, ignore_index=config.ignore_index)
        return Detector(
            model,
            num_classes,
            img_size=config.img_size,
            masks=config.masks,
            mean=config.mean,
            std=config.std,
            channels=config.channels,
            **config.options_of("detector_options"),
        )
