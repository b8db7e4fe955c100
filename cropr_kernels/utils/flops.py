"""Counting floating-point operations, with all of them counted."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count


def _missing() -> dict[Any, Callable[..., Any]]:
    """Attention on the CPU, which PyTorch before 2.15 does not count."""
    name = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return {} if name in flop_registry else {name: _attention}


def _attention(query_shape: Any, key_shape: Any, value_shape: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


def flop_counter() -> FlopCounterMode:
    """A context whose get_total_flops() is that of what ran in it: two a multiply-add; the cropr ops have formulas."""
    return FlopCounterMode(display=False, custom_mapping=_missing())
