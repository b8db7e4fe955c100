"""Small Vision Transformers of the structure that research code of the hubs has, random weights."""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

DIM = 64


class Attention(nn.Module):
    """Attention written out; with rotary positions by scaled_dot_product_attention."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x, rope=None):
        batch, count, _ = x.shape
        q, k, v = self.qkv(x).view(batch, count, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if rope is None:
            weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
            heads = weights @ v
        else:
            heads = scaled_dot_product_attention(turned(q, *rope), turned(k, *rope), v)
        return self.proj(heads.transpose(1, 2).reshape(batch, count, -1))


def turned(x, sin, cos):
    """Turn the last tokens of x by the angles of a table (patches, C)."""
    prefix = x.shape[-2] - sin.shape[-2]
    first, last = x.split([prefix, sin.shape[-2]], -2)
    half = torch.cat([-last[..., last.shape[-1] // 2 :], last[..., : last.shape[-1] // 2]], -1)
    return torch.cat([first, last * cos + half * sin], -2)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((DIM,), 0.1))

    def forward(self, x):
        return x * self.gamma


class Mlp(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))


class Block(nn.Module):
    """A block that takes tokens, or a list of these with a list of rotary tables."""

    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(DIM), Attention(), Scale()
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(DIM), Mlp(), Scale()

    def forward(self, x_or_x_list, rope_or_rope_list=None):
        if not isinstance(x_or_x_list, list):
            return self.forward([x_or_x_list], [rope_or_rope_list])[0]
        outputs = []
        for x, rope in zip(x_or_x_list, rope_or_rope_list):
            x = x + self.ls1(self.attn(self.norm1(x), rope))
            outputs.append(x + self.ls2(self.mlp(self.norm2(x))))
        return outputs


class PatchEmbed(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, DIM, 8, 8)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class HubDino(nn.Module):
    """A Vision Transformer with a method for the maps of the last blocks, as DINOv2 in its
    repository; `lists` as DINOv3: blocks take lists, and rotary tables in each call."""

    def __init__(self, *, lists, num_storage=0):
        super().__init__()
        self.lists = lists
        self.patch_embed = PatchEmbed()
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.storage = nn.Parameter(torch.randn(1, num_storage, DIM))
        self.pos_embed = None if lists else nn.Parameter(torch.randn(1, 65, DIM))
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Identity()
        self.img_size = 64

    def prepare_tokens_with_masks(self, images):
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = x if self.pos_embed is None else x + self.pos_embed
        return torch.cat([x[:, :1], self.storage.expand(len(x), -1, -1), x[:, 1:]], 1)

    def rope(self, images):
        """Sines and cosines (patches, C)."""
        height, width = images.shape[-2] // 8, images.shape[-1] // 8
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([rows, columns], -1).flatten(0, 1).to(images)
        angles = places.repeat(1, DIM // 4 // 2).repeat(1, 2) * 0.3
        return angles.sin(), angles.cos()

    def run_blocks(self, images):
        x = self.prepare_tokens_with_masks(images)
        for block in self.blocks:
            x = block([x], [self.rope(images)])[0] if self.lists else block(x)
            yield x

    def forward_features(self, images):
        *_, x = self.run_blocks(images)
        x = self.norm(x)
        first = 1 + self.storage.shape[1]
        return {"x_norm_clstoken": x[:, 0], "x_norm_patchtokens": x[:, first:]}

    def get_intermediate_layers(self, images, n=1):
        """The normalized maps (B, patches, D) of the last n blocks."""
        first = 1 + self.storage.shape[1]
        return tuple(self.norm(x)[:, first:] for x in [*self.run_blocks(images)][-n:])

    def forward(self, images, is_training=False):
        features = self.forward_features(images)
        return features if is_training else self.head(features["x_norm_clstoken"])


class ResidualAttentionBlock(nn.Module):
    """A block on (N, B, D), as CLIP in its repository."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(DIM, 2)
        self.ln_1, self.mlp, self.ln_2 = nn.LayerNorm(DIM), Mlp(), nn.LayerNorm(DIM)

    def forward(self, x):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class HubClip(nn.Module):
    """CLIP's vision tower, whose blocks take (N, B, D)."""

    def __init__(self):
        super().__init__()
        self.input_resolution = 64
        self.conv1 = nn.Conv2d(3, DIM, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(DIM))
        self.positional_embedding = nn.Parameter(torch.randn(65, DIM))
        self.ln_pre, self.ln_post = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.resblocks = nn.Sequential(*(ResidualAttentionBlock() for _ in range(4)))
        self.proj = nn.Parameter(torch.randn(DIM, 16))

    def forward(self, images):
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.ln_pre(x + self.positional_embedding)
        x = self.resblocks(x.transpose(0, 1)).transpose(0, 1)
        return self.ln_post(x[:, 0]) @ self.proj


HUB = {
    "DINOv2 of the hub": lambda: HubDino(lists=False),
    "DINOv3 of the hub": lambda: HubDino(lists=True, num_storage=4),
    "CLIP of the hub": HubClip,
}
