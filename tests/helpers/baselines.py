"""Baselines on a small ViT, and the context that their reducers read."""

import torch

from benchmarks.baselines.network import Context, Reduced
from benchmarks.baselines.registry import REDUCE_ONCE, SYSTEMS
from helpers.models import randomize, reference_vit

COUNTS = [50, 40, 31]
DIM, TOKENS, HEADS, KEEP = 8, 22, 2, 14


def counts_for(name):
    return [65, 31, 31] if name in REDUCE_ONCE else COUNTS


def make(name, **options):
    return Reduced(randomize(reference_vit(**options)), SYSTEMS[name], counts_for(name)).eval()


def context_of(x, prefix=1, sizes=None, depth=0.0):
    """Return every input of a reducer, in a block at this relative depth."""
    batch, tokens, _ = x.shape
    q, k, v = (torch.randn(batch, HEADS, tokens, 4, dtype=x.dtype) for _ in range(3))
    attention = (q @ k.transpose(2, 3)).softmax(-1).to(x.dtype)
    patches, update = torch.randn(batch, tokens - prefix, 12), torch.randn_like(x)
    return Context(
        attention, attention[:, :, 0], k, v, patches, sizes=sizes, update=update, depth=depth
    )
