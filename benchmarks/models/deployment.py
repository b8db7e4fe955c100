"""Networks of one set of weights: created, deployed, with other modules in place of Cropr's."""

import copy
from typing import Any

import torch

import cropr_kernels as cropr
from benchmarks.baselines.modules import PruningModule
from cropr_kernels.models.vit import PRESETS
from cropr_kernels.pruning.api import deployed_copy


def image_size(name: str) -> int:
    """Pixels a side, of a preset."""
    return int(PRESETS[name].get("img_size", 224))


def create(name: str, device: str, dtype: torch.dtype, **changes: Any) -> Any:
    """The reference ViT of a preset with random weights, the same at every call."""
    torch.manual_seed(0)
    return cropr.create_vit(name, **changes).eval().requires_grad_(False).to(device, dtype)


def deploy(model: Any, plain: Any, **options: Any) -> Any:
    """For inference, with the weights of `plain` where they are: whoever has its own finds them colder in the cache."""
    deployed = deployed_copy(model, **options)
    shared = dict(plain.named_parameters())
    for name, module in deployed.named_modules():
        for key in list(module._parameters):
            own = shared.get(f"{name}.{key}" if name else key)
            if own is not None:
                module._parameters[key] = own
    return deployed


def pruned(plain: Any, **options: Any) -> Any:
    """`cropr.apply` to a copy, without auxiliary heads unless the options say otherwise."""
    return cropr.apply(copy.deepcopy(plain), **{"num_outputs": 0, **options})


def unpruned(plain: Any) -> Any:
    """On the engine."""
    return deploy(pruned(plain, rate=0), plain)


def with_modules(model: Any, plain: Any, kind: type[PruningModule]) -> Any:
    """A pruned model on the functional ops, with others in place of its Cropr modules."""
    other = deploy(model, plain, engine=False)
    for layer, module in enumerate(model.cropr):
        other.cropr[layer] = kind(module)
    return other
