"""Counting of all floating-point operations."""

import contextlib
from collections.abc import Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count


@contextlib.contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """Count the FLOPs of what runs in this context, two per multiply-add: get_total_flops()."""
    # PyTorch before 2.15 does not count it
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formula = {
        on_cpu: lambda query, key, value, *args, **kwargs: sdpa_flop_count(query, key, value)
    }
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # nn.MultiheadAttention as one operator, which is not counted
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(
            display=False, custom_mapping={} if on_cpu in flop_registry else formula
        ) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
