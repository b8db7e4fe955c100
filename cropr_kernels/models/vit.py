"""The reference Vision Transformer, plain and EVA-02, with timm's parameter names.

State dicts of timm's ``vit_*``, ``deit_*`` (class token, registers, average pooling, LayerScale)
and ``eva02_*`` (rotary positions, SwiGLU, sub-norms) load unchanged; timm itself is not needed.
Sources: Dosovitskiy et al. 2021, Darcet et al. 2024 (registers), Fang et al. 2023 (EVA-02).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .blocks import project_heads

_layer_norm = partial(nn.LayerNorm, eps=1e-6)


@dataclass(frozen=True)
class ViTConfig:
    """Options of a Vision Transformer; names and defaults as in timm."""

    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_norm: bool = False
    init_values: float | None = None  # LayerScale
    class_token: bool = True
    reg_tokens: int = 0
    no_embed_class: bool = False  # position embedding covers the patches only
    global_pool: Literal["token", "avg"] = "token"
    fc_norm: bool | None = None  # the last norm is after the pooling; None: with average pooling
    drop_path_rate: float = 0.0
    # EVA-02
    qkv: Literal["joint", "joint_eva", "split"] = "joint"
    swiglu: bool = False
    scale_mlp: bool = False
    rope: bool = False
    rope_ref_grid: int | None = None  # grid side the rotary frequencies were trained at

    @property
    def num_prefix_tokens(self) -> int:
        """Class token and registers: tokens that are not patches."""
        return int(self.class_token) + self.reg_tokens


class DropPath(nn.Module):
    """Stochastic depth: drop the residual branch of whole images with probability ``drop_prob`` in
    training."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep) / keep


class LayerScale(nn.Module):
    def __init__(self, dim: int, init_values: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    """Two layers with GELU, or SwiGLU: packed in one matrix, or split with a norm between
    (scale_mlp)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        dim = config.embed_dim
        hidden = int(dim * config.mlp_ratio)
        self.swiglu = config.swiglu
        self.split = config.swiglu and config.scale_mlp
        if self.split:
            self.fc1_g, self.fc1_x = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        else:
            self.fc1 = nn.Linear(dim, 2 * hidden if self.swiglu else hidden)
        self.norm = _layer_norm(hidden) if config.scale_mlp else nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.split:
            hidden = F.silu(self.fc1_g(x)) * self.fc1_x(x)
        elif self.swiglu:
            gate, value = self.fc1(x).chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        else:
            hidden = F.gelu(self.fc1(x))
        return self.fc2(self.norm(hidden))


def rotary_table(
    height: int, width: int, head_dim: int, ref_grid: int | None, device: torch.device
) -> Tensor:
    """Sines and cosines of 2-D rotary positions, one row per patch: (height * width, 2 * head_dim)
    float32.

    Frequencies 10000^(-4 i / head_dim), the first half of the channels for the row, the second for
    the column; coordinates are scaled to the grid that the frequencies were trained at.
    """
    bands = 10000.0 ** -(
        torch.arange(head_dim // 4, device=device, dtype=torch.float32) / (head_dim // 4)
    )
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in (height, width)]
    if ref_grid is not None:
        axes = [axis / len(axis) * ref_grid for axis in axes]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    angles = (grid.unsqueeze(-1) * bands).reshape(height * width, -1).repeat_interleave(2, dim=-1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def rotate(x: Tensor, rope: Tensor, num_prefix: int) -> Tensor:
    """Apply rotary positions to the patches of x (B, heads, N, head_dim); prefix tokens pass
    unchanged.

    rope: (patches, 2 * head_dim), or (B, 1, patches, 2 * head_dim) if images hold different
        patches.
    """
    prefix, patches = x[:, :, :num_prefix], x[:, :, num_prefix:]
    sin, cos = rope.chunk(2, dim=-1)
    rotated = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([prefix, (patches * cos + rotated * sin).to(x.dtype)], dim=2)


class Attention(nn.Module):
    """Multi-head self-attention through SDPA; the three ways timm names and biases its
    projections."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        dim = config.embed_dim
        head_dim = dim // config.num_heads
        self.num_heads = config.num_heads
        self.num_prefix = config.num_prefix_tokens
        self.qkv: nn.Linear | None = None
        if config.qkv == "split":
            self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
            self.v_proj = nn.Linear(dim, dim)
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias and config.qkv == "joint")
        if config.qkv == "joint_eva":
            self.q_bias, self.v_bias = (
                nn.Parameter(torch.zeros(dim)),
                nn.Parameter(torch.zeros(dim)),
            )
            self.register_buffer("k_bias", torch.zeros(dim), persistent=False)
        self.q_norm: nn.Module = _layer_norm(head_dim) if config.qk_norm else nn.Identity()
        self.k_norm: nn.Module = _layer_norm(head_dim) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        q, k, v = project_heads(self, x)
        if rope is not None:
            q, k = rotate(q, rope, self.num_prefix), rotate(k, rope, self.num_prefix)
        heads = F.scaled_dot_product_attention(q, k, v)
        return self.proj(heads.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ViTConfig, drop_path: float):
        super().__init__()
        dim = config.embed_dim
        scale = config.init_values
        self.norm1 = _layer_norm(dim)
        self.attn = Attention(config)
        self.ls1 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = _layer_norm(dim)
        self.mlp = Mlp(config)
        self.ls2 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), rope=rope)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        side = config.patch_size
        grid = config.img_size // side
        self.img_size = (config.img_size, config.img_size)
        self.patch_size = (side, side)
        self.grid_size = (grid, grid)
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, side, side)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H / patch, W / patch, D)."""
        return self.proj(images).permute(0, 2, 3, 1)


def resize_positions(
    table: Tensor, prefix: int, old: tuple[int, int], new: tuple[int, int]
) -> Tensor:
    """Resize position embeddings (1, prefix + patches, D) from one grid to another (bicubic); the
    prefix stays."""
    grid = table[:, prefix:].float().unflatten(1, old).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True)
    return torch.cat(
        [table[:, :prefix], grid.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1
    )


def _is_known(condition: bool) -> bool:
    """Tell whether a condition on sizes holds whatever sizes are symbols; torch.jit has tensors in
    place of these."""
    if isinstance(condition, bool | Tensor):
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # loads sympy

    return statically_known_true(condition)


class ViT(nn.Module):
    """Vision Transformer over images (B, C, H, W) of any size whose sides are multiples of the
    patch size.

    The position embedding is resized (bicubic) to the grid of the images, and so are rotary
    positions.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        dim = config.embed_dim
        if config.global_pool == "token" and not config.class_token:
            raise ValueError("ViT: global_pool='token' needs class_token=True")
        if dim % config.num_heads:
            raise ValueError(
                f"ViT: embed_dim must be a multiple of num_heads = {config.num_heads}, got {dim}"
            )
        self.config = config
        self.grid = config.img_size // config.patch_size
        self.num_prefix_tokens = config.num_prefix_tokens
        self.num_classes = config.num_classes
        self.embed_dim = dim
        self.global_pool = config.global_pool
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.class_token else None
        self.reg_token = (
            nn.Parameter(torch.zeros(1, config.reg_tokens, dim)) if config.reg_tokens else None
        )
        embedded_prefix = 0 if config.no_embed_class else self.num_prefix_tokens
        self.pos_embed = nn.Parameter(torch.zeros(1, embedded_prefix + self.grid**2, dim))
        # Stochastic depth rises linearly with the layer
        step = config.drop_path_rate / max(config.depth - 1, 1)
        self.blocks = nn.ModuleList([Block(config, step * layer) for layer in range(config.depth)])
        pools_first = config.global_pool == "avg" if config.fc_norm is None else config.fc_norm
        self.norm = nn.Identity() if pools_first else _layer_norm(dim)
        self.fc_norm = _layer_norm(dim) if pools_first else nn.Identity()
        self.head = nn.Linear(dim, config.num_classes) if config.num_classes else nn.Identity()
        self.grad_checkpointing = False
        self._init_weights()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of blocks in backward instead of keeping them."""
        self.grad_checkpointing = enable

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in (self.pos_embed, self.cls_token, self.reg_token):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def _resized_pos_embed(self, height: int, width: int) -> Tensor:
        if _is_known(height == self.grid) and _is_known(width == self.grid):
            return self.pos_embed
        prefix = self.pos_embed.shape[1] - self.grid**2
        return resize_positions(self.pos_embed, prefix, (self.grid, self.grid), (height, width))

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embed images: tokens (B, P + patches, D) and, for rotary models, the table (patches, 2 *
        head_dim)."""
        patch = self.config.patch_size
        channels = self.config.in_chans
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(
                f"ViT: images must have shape (B, {channels}, H, W), got {tuple(images.shape)}"
            )
        if (
            images.shape[2] % patch
            or images.shape[3] % patch
            or not images.shape[2]
            or not images.shape[3]
        ):
            raise ValueError(
                f"ViT: image height and width must be multiples of {patch}, got "
                f"{tuple(images.shape[2:])}"
            )
        x = self.patch_embed(images)
        batch, height, width, _ = x.shape
        x = x.flatten(1, 2)
        pos_embed = self._resized_pos_embed(height, width)
        prefix = [
            token.expand(batch, -1, -1)
            for token in (self.cls_token, self.reg_token)
            if token is not None
        ]
        if self.config.no_embed_class:
            x = torch.cat([*prefix, x + pos_embed], dim=1)
        else:
            x = torch.cat([*prefix, x], dim=1) + pos_embed
        if not self.config.rope:
            return x, None
        head_dim = self.embed_dim // self.config.num_heads
        return x, rotary_table(height, width, head_dim, self.config.rope_ref_grid, x.device)

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens after the last block, (B, P + patches, D)."""
        x, rope = self.embed(images)
        recompute = self.grad_checkpointing and self.training
        for block in self.blocks:
            x = (
                checkpoint(block, x, rope=rope, use_reentrant=False)
                if recompute
                else block(x, rope=rope)
            )
        return self.norm(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """Pool tokens (class token, or mean of the patches) and classify: (B, classes)."""
        pooled = (
            x[:, 0]
            if self.config.global_pool == "token"
            else x[:, self.num_prefix_tokens :].mean(dim=1)
        )
        return self.head(self.fc_norm(pooled))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def _sizes(width: int, depth: int = 12) -> dict[str, Any]:
    return {"embed_dim": width, "depth": depth, "num_heads": width // 64}


_PLAIN = {"tiny": _sizes(192), "small": _sizes(384), "base": _sizes(768), "large": _sizes(1024, 24)}
_EVA02 = {
    "global_pool": "avg",
    "mlp_ratio": 4 * 2 / 3,
    "swiglu": True,
    "rope": True,
    "patch_size": 14,
}
_EVA02_SMALL = {**_EVA02, "qkv": "joint_eva", "rope_ref_grid": 16}
_EVA02_LARGE = {**_EVA02, "qkv": "split", "scale_mlp": True, "rope_ref_grid": 16, "img_size": 448}
_REGISTERS_GAP = {
    "class_token": False,
    "no_embed_class": True,
    "reg_tokens": 4,
    "global_pool": "avg",
    "img_size": 256,
}

PRESETS: dict[str, dict[str, Any]] = {
    **{f"vit_{name}_patch16_{side}": {**width, "img_size": side}
       for name, width in _PLAIN.items() for side in (224, 384)},
    **{f"deit_{name}_patch16_{side}": {**_PLAIN[name], "img_size": side}
       for name in ("tiny", "small", "base") for side in (224, 384)},
    "vit_medium_patch16_gap_256": {
        **_sizes(512), "class_token": False, "global_pool": "avg", "qkv_bias": False,
        "init_values": 1e-6,
        "fc_norm": False, "img_size": 256,
    },
    "vit_base_patch16_reg4_gap_256": {**_sizes(768), **_REGISTERS_GAP},
    "vit_small_patch14_reg4_dinov2": {
        **_sizes(384), "patch_size": 14, "img_size": 518, "init_values": 1e-5, "reg_tokens": 4,
        "no_embed_class": True, "num_classes": 0,
    },
    "deit3_small_patch16_224": {**_sizes(384), "no_embed_class": True, "init_values": 1e-6},
    "eva02_tiny_patch14_224": {**_sizes(192), **_EVA02_SMALL},
    "eva02_small_patch14_224": {**_sizes(384), **_EVA02_SMALL},
    "eva02_base_patch14_448": {**_sizes(768), **_EVA02_LARGE},
    "eva02_large_patch14_448": {**_sizes(1024, 24), **_EVA02_LARGE},
}  # fmt: skip


def create_vit(name: str, **overrides: Any) -> ViT:
    """Build a reference ViT by timm's name, with random weights.

    Args:
        name: a key of ``PRESETS``, such as ``vit_small_patch16_224``.
        overrides: fields of ``ViTConfig`` to change, such as ``num_classes=10``.

    Raises:
        ValueError: the name or a field is unknown.
    """
    if name not in PRESETS:
        raise ValueError(f"create_vit: name must be one of {', '.join(PRESETS)}; got {name!r}")
    fields = sorted(ViTConfig.__dataclass_fields__)
    unknown = sorted(set(overrides) - set(fields))
    if unknown:
        raise ValueError(
            f"create_vit: no such option {', '.join(unknown)}; options are {', '.join(fields)}"
        )
    return ViT(ViTConfig(**{**PRESETS[name], **overrides}))
