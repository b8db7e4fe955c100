"""`cropr_kernels.ViT`."""

from typing import Protocol

from torch import Tensor, nn

from ..blocks import (
    Segments,
    TimmAttention,
    attention_by_projection,
    pads_projection,
    prefers_rows,
    project_heads,
    proportional_attention,
)
from ..rotary import Rotary
from ..vit import Block, ViT
from .base import BlockParts, ModelSpec, base_class
from .structure import num_heads_of


def find(model: nn.Module) -> ModelSpec | None:
    return spec_of(model) if isinstance(model, ViT) else None


class PatchEmbed(Protocol):
    """The embedding of patches."""

    @property
    def proj(self) -> nn.Module: ...

    @property
    def img_size(self) -> tuple[int, int]: ...

    @property
    def grid_size(self) -> tuple[int, int]: ...


class _TimmModel(Protocol):
    """A model with timm's attributes."""

    blocks: nn.ModuleList
    patch_embed: PatchEmbed
    num_prefix_tokens: int
    embed_dim: int
    num_classes: int
    global_pool: str


def spec_of(model: nn.Module, embed: PatchEmbed | None = None) -> ModelSpec:
    """Specify a model with timm's attributes; its embedding is `patch_embed` unless given."""
    timm_model: _TimmModel = model  # type: ignore[assignment]
    blocks = list(timm_model.blocks)
    embed = embed or timm_model.patch_embed
    height, width = embed.img_size
    channels: int = getattr(model, "in_chans", getattr(embed.proj, "in_channels", 3))
    pool = timm_model.global_pool
    averages = pool in ("avg", "avgmax", "max") and not getattr(model, "pool_include_prefix", False)
    return ModelSpec(
        blocks=blocks,
        projection=embed.proj,
        norm=getattr(model, "norm", None),
        tower=model,
        num_prefix=timm_model.num_prefix_tokens,
        dim=timm_model.embed_dim,
        num_heads=num_heads_of(blocks[0]),
        image_shape=(channels, height, width),
        patch_size=(height // embed.grid_size[0], width // embed.grid_size[1]),
        grid=embed.grid_size,
        num_classes=timm_model.num_classes,
        class_token=getattr(model, "cls_token", None) is not None and pool in ("token", ""),
        pooling="token" if pool == "token" else "average" if averages else "other",
        returns_tokens=pool != "token",
        head=(("global_pool", pool), ("num_classes", timm_model.num_classes)),
    )


def parts(block: nn.Module) -> BlockParts | None:
    if base_class(block) is not Block:
        return None
    return BlockParts(block, "norm1", "norm2", "attn", attend, scales, opened=("qkv",))


def attend(
    module: nn.Module,
    h: Tensor,
    rotary: Rotary | None,
    log_sizes: Tensor | None,
    segments: Segments | None = None,
) -> Tensor:
    """Run an attention with timm's names: its own forward unless positions, sizes or images enter
    its heads, or `attention_by_rows` is faster."""
    attn: TimmAttention = module  # type: ignore[assignment]
    if rotary is None and log_sizes is None and segments is None and not prefers_rows(h):
        return attn(h)
    fits = rotary is None and segments is None
    if fits and log_sizes is not None and pads_projection(attn, h):
        heads = attention_by_projection(attn, h, log_sizes)
    else:
        q, k, v = project_heads(attn, h)
        if rotary is not None:
            half = getattr(attn, "rotate_half", False)
            rotary.rotate_(q, half=half)
            rotary.rotate_(k, half=half)
        q, k = q.type_as(v), k.type_as(v)
        heads = proportional_attention(q, k, v, log_sizes, segments=segments)
    heads = heads.transpose(1, 2).flatten(2)
    heads = attn.proj(attn.norm(heads) if hasattr(attn, "norm") else heads)
    return attn.proj_drop(heads) if hasattr(attn, "proj_drop") else heads


def scales(block: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The factors of LayerScale, if any, of a block with timm's names."""
    return getattr(block.ls1, "gamma", None), getattr(block.ls2, "gamma", None)
