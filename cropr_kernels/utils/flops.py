"""Counting floating-point operations, with all of them counted."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count


def _attention(query_shape: Any, key_shape: Any, value_shape: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


@contextlib.contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """A context whose get_total_flops() is that of what ran in it: two a multiply-add; the cropr ops have formulas."""
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # PyTorch before 2.15 does not count it
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention as one operator that nobody counts
    try:
        with FlopCounterMode(
            display=False, custom_mapping={} if on_cpu in flop_registry else {on_cpu: _attention}
        ) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
