"""Networks with one set of weights: created, pruned, deployed, or with other modules."""

import copy
from typing import Any

import torch

import cropr_kernels as cropr
from benchmarks.baselines.modules import PruningModule
from cropr_kernels.models.vit import PRESETS, ViT
from cropr_kernels.pruning.deployment import deployed_copy


def image_size(name: str) -> int:
    """Side of a preset's images in pixels."""
    return int(PRESETS[name].get("img_size", 224))


def create(name: str, device: str, dtype: torch.dtype, **changes: Any) -> ViT:
    """Create the reference ViT of a preset with random weights, the same at every call."""
    torch.manual_seed(0)
    return cropr.create_vit(name, **changes).eval().requires_grad_(False).to(device, dtype)


def deploy(model: Any, plain: ViT, **options: Any) -> Any:
    """Deploy with the weights of `plain` shared: a second copy would be colder in the cache."""
    deployed = deployed_copy(model, **options)
    shared = dict(plain.named_parameters())
    for name, module in deployed.named_modules():
        for key in list(module._parameters):
            shared_parameter = shared.get(f"{name}.{key}" if name else key)
            if shared_parameter is not None:
                module._parameters[key] = shared_parameter
    return deployed


def pruned(plain: ViT, **options: Any) -> Any:
    """Apply Cropr to a copy, without auxiliary heads by default."""
    return cropr.apply(copy.deepcopy(plain), **{"num_outputs": 0, **options})


def unpruned(plain: ViT) -> Any:
    """Deploy on the engine without pruning."""
    return deploy(pruned(plain, rate=0), plain)


def with_modules(model: Any, plain: ViT, make: type[PruningModule]) -> Any:
    """Deploy a model on the functional ops, with make(module) in place of each Cropr module."""
    replaced = deploy(model, plain, engine=False)
    for layer, module in enumerate(model.cropr):
        replaced.cropr[layer] = make(module)
    return replaced
