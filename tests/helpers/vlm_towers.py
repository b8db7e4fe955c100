"""Towers that pack images: what their blocks receive, and a block on all rows."""

import torch

from cropr_kernels.vlm.packed import blocks_of


class Recorder:
    """Inputs of all blocks of a tower, and the output of the last."""

    def __init__(self, tower):
        self.arguments = []
        self.output = None
        self.hooks = []
        blocks = blocks_of(tower)
        for block in blocks:
            self.hooks.append(block.register_forward_pre_hook(self.record, with_kwargs=True))
        self.hooks.append(blocks[-1].register_forward_hook(self.keep))

    def record(self, block, args, kwargs):
        self.arguments.append((args[0], kwargs))

    def keep(self, block, args, output):
        self.output = output

    def remove(self):
        for hook in self.hooks:
            hook.remove()


def rotated(heads, cos, sin):
    half = heads.shape[-1] // 2
    turned = torch.cat([-heads[..., half:], heads[..., :half]], -1)
    return heads * cos[:, None] + turned * sin[:, None]


def dense_attention(block, x, allowed, tables, log_sizes=0.0):
    """Return the probabilities (heads, T, T) and values (T, heads, C) of a block on all rows x
    (T, D); row i attends to row j if allowed[i, j], by log_sizes[j] more."""
    h = block.norm1(x)
    qkv = block.attn.qkv(h).unflatten(1, (3, block.attn.num_heads, -1))
    q, k, v = rotated(qkv[:, 0], *tables), rotated(qkv[:, 1], *tables), qkv[:, 2]
    logits = torch.einsum("ihc,jhc->hij", q, k) * q.shape[-1] ** -0.5 + log_sizes
    return logits.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(), v


def dense_block(block, x, *attention):
    """Run a block on all rows x (T, D)."""
    probabilities, v = dense_attention(block, x, *attention)
    x = x + block.attn.proj(torch.einsum("hij,jhc->ihc", probabilities, v).flatten(1))
    return x + block.mlp(block.norm2(x))


def same_segment(arguments, num_rows):
    """Return whether two rows are in one segment of a block with these arguments, (T, T)."""
    segment = torch.bucketize(torch.arange(num_rows), arguments["cu_seqlens"], right=True)
    return segment[:, None] == segment
