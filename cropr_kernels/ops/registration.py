"""Registers the ops of namespace ``cropr`` with PyTorch; the only file that does so in Python.

Schemas are those of csrc/library.h; CPU kernels register when ``_C`` is imported.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from .cuda import FILES, cuda_kernel
from .definitions import DEFINITIONS
from .extension import NAMES, table
from .fakes import fake_kernel
from .flops import FLOPS, TAKES_TENSORS, no_flops
from .gradients import GRADIENTS, increment_versions, reject_gradient

_library = torch.library.Library("cropr", "DEF")

for _name, (_schema, *_) in zip(NAMES, table):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, cuda_kernel(_name, FILES[_name]), "CUDA")
    torch.library.register_fake(f"cropr::{_name}", fake_kernel(_name), lib=_library)
    register_flop_formula(getattr(torch.ops.cropr, _name), get_raw=_name in TAKES_TENSORS)(
        FLOPS.get(_name, no_flops)
    )
    # torch.func differentiates and vectorizes operators that it knows: under it an op is its
    # definition.
    if not _name.endswith(("_", "norm", "backward")):
        _library.impl(_name, DEFINITIONS[_name], "FuncTorchDynamicLayerFrontMode")

for _name, (_backward, _setup) in GRADIENTS.items():
    torch.library.register_autograd(
        f"cropr::{_name}", _backward, setup_context=_setup, lib=_library
    )

for _name in NAMES:
    if not _name.endswith(("_", "_norm", "_segments")):  # only the engine's
        continue
    _library.impl(_name, reject_gradient(_name), "Autograd", with_keyset=True)
    if _name.endswith("_"):
        _library.impl(_name, increment_versions(_name), "ADInplaceOrView", with_keyset=True)
