"""Specifications of a model for pruning (`ModelSpec`) and of its blocks for the engine
(`BlockParts`)."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from ..arguments import PLAIN, ArgumentRule
from ..blocks import Segments
from ..head_probing import Pooling
from ..map_attention import Heads, attend, heads_of
from ..packed_linear import is_plain_linear
from ..patch_inputs import PatchInputs
from ..rotary import Rotary
from ..tiling import AttentionRows
from ..token_format import BATCH_FIRST, TokenFormat


@dataclass(frozen=True)
class ModelSpec:
    """A Vision Transformer as pruning sees it. Its own forward calls the blocks one after the
    other.

    Blocks take the tokens (B, N, D) first, and return them, alone or as the first of a tuple.
    `find_spec` makes one; of a model that it does not know, `apply` takes one of yours.
    """

    blocks: list[nn.Module]
    tower: nn.Module  # called with the images alone; it runs the blocks
    num_prefix: int  # P, first tokens that are no patches
    dim: int
    num_heads: int
    # Of one image of the model's own size, (C, H, W); of a video (frames, C, H, W)
    image_shape: tuple[int, ...]
    patch_size: tuple[int, int]  # pixels from one patch to the next
    grid: tuple[int, int]  # patches in height and width of such an image
    num_classes: int = 0  # 0: it has no classifier
    class_token: bool = True  # the head looks at the class token; else at the patches
    pooling: Pooling = "token"  # of the tokens, in the head
    returns_tokens: bool = True  # the output also holds the tokens, or the head reads the patches
    needs_map: bool = False  # the head reads all patches, their places or their number
    map_layers: tuple[int, ...] = ()  # blocks whose output the model reads past the next block
    # Its output (B, D, grid height, grid width) is the patch grid, or the second of two values
    projection: nn.Module | None = None
    norm: nn.Module | None = None  # the last norm of the tokens
    # The innermost module that takes the images and runs the blocks; None: the tower
    inner: nn.Module | None = None
    block_outputs: int = 0  # values in the tuple that a block returns; 0: the tokens alone
    rotary_heads: bool = False  # its rotary tables are (heads, patches, C)
    has_bias: bool = False  # its attention adds a bias that it makes for all tokens
    argument_rule: ArgumentRule = PLAIN  # of rotary tables and positions
    token_format: TokenFormat = BATCH_FIRST
    # Arguments of the tower, made of images (B, C, H, W); None: it takes these
    make_inputs: Callable[[Tensor], dict[str, Tensor]] | None = None
    # Of a tower that takes patches of images of any size
    patch_inputs: PatchInputs | None = None
    frames: int = 1  # of a video, whose grids stand below each other
    refusal: str | None = None  # the reason why patches cannot be named by their place in the image
    # Attributes of the model that decide on its head, and their values
    head: tuple[tuple[str, object], ...] = ()
    engine: "list[BlockParts] | None" = None  # the blocks, if probing found their parts
    engine_refusal: str = ""
    # Blocks over maps, as they run on a part of the tokens; None: they take tokens (B, N, D)
    map_blocks: "list[MapBlock] | None" = None

    @property
    def window(self) -> int:
        """Patches on a side of the windows of blocks over maps; 0: there are none."""
        return max((block.window for block in self.map_blocks or ()), default=0)

    def num_scheduled(self, grid: tuple[int, int]) -> int:
        """Count the tokens that a schedule is for: of an image of this patch grid, or of a
        window."""
        if self.window:
            return min(grid[0], self.window) * min(grid[1], self.window)
        return self.num_prefix + grid[0] * grid[1]

    def run(self, images: Tensor, **kwargs: object) -> object:
        """Run the tower on images (B, C, H, W), or on what it takes."""
        if self.make_inputs is None or images.ndim != 1 + len(self.image_shape):
            return self.tower(images, **kwargs)
        return self.tower(**self.make_inputs(images), **kwargs)

    def img_size_of(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The height and width in pixels of images of such a patch grid."""
        if tuple(grid) == self.grid:
            return self.img_size
        return grid[0] * self.patch_size[0] // self.frames, grid[1] * self.patch_size[1]

    def grid_of(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The patches in height and width of images of this height and width in pixels."""
        if tuple(img_size) == self.img_size:
            return self.grid
        return self.frames * (img_size[0] // self.patch_size[0]), img_size[1] // self.patch_size[1]

    @property
    def img_size(self) -> tuple[int, int]:
        """The height and width of the model's own images in pixels."""
        return self.image_shape[-2], self.image_shape[-1]

    @property
    def encoder(self) -> nn.Module:
        return self.tower if self.inner is None else self.inner


class Submodule(NamedTuple):
    """A module and its name in its owner."""

    owner: nn.Module
    name: str
    module: nn.Module


class Attend(Protocol):
    """The call of an attention on h (B, K, D), with rotary positions and log_sizes (B, K); with
    segments the images of a batch stand in one row, B = 1."""

    def __call__(
        self,
        module: nn.Module,
        h: Tensor,
        rotary: Rotary | None,
        log_sizes: Tensor | None,
        segments: Segments | None = None,
        /,
    ) -> Tensor: ...


# block -> the factors g1 and g2 of LayerScale
Scales = Callable[[nn.Module], tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class BlockParts:
    """A pre-norm block x + g1 * attention(norm1(x)), x + g2 * mlp(norm2(x)), as the engine runs it.

    Modules are looked up in `block` at every call, so replaced parameters are seen.
    """

    block: nn.Module
    norm1: str  # names of its modules
    norm2: str
    attn: str
    attend: Attend
    scales: Scales
    # Classes of norms that probing has seen to be LayerNorm or RMSNorm
    norm_classes: tuple[type, ...] = ()
    # Modules of the attention that `attend` uses without their forward
    opened: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ("mlp",)  # the second of two adds its second argument
    packs: bool = True  # its attention takes the images of a batch in one row

    def run_mlp(self, block: nn.Module, h: Tensor) -> Tensor:
        """Compute the update mlp(h) of normalized tokens h (B, K, D)."""
        first, *rest = (getattr(block, name) for name in self.mlp)
        update = first(h)
        return rest[0](update, update.new_zeros(())) if rest else update

    def watched(self) -> list[Submodule]:
        """Modules that the engine uses or bypasses, and would miss a change of; it calls the MLP as
        it is."""
        owners = (self.block, getattr(self.block, self.attn))
        submodules = [
            Submodule(owner, *child) for owner in owners for child in owner.named_children()
        ]
        return [
            submodule
            for submodule in submodules
            if not any(submodule.module is getattr(self.block, name) for name in self.mlp)
        ]


@dataclass(frozen=True)
class MapBlock:
    """A pre-norm block over maps (B, height, width, D), run on any part of the tokens."""

    parts: BlockParts  # but `attend`
    window: int  # patches on a side of its windows; 0: it sees the full map
    num_heads: int

    def run(self, x: Tensor, rows: Sequence[AttentionRows]) -> Tensor:
        """Return the output for tokens x (B, N, D), which stand in these rows one after the other.

        Raises:
            ValueError: the attention has hooks, which would not run.
        """
        block = self.parts.block
        if is_hooked(self._attention):
            raise ValueError(
                f"cropr: {type(self._attention).__name__} has forward hooks of others, which do "
                "not run on a part of a map; put them on the block"
            )
        gamma1, gamma2 = self.parts.scales(block)
        update = attend(block, self._attention, self.num_heads, self._input(x), rows)
        x = x + (update if gamma1 is None else update * gamma1)
        update = self.parts.run_mlp(block, getattr(block, self.parts.norm2)(x))
        return x + (update if gamma2 is None else update * gamma2)

    def heads(self, x: Tensor, rows: Sequence[AttentionRows]) -> Iterator[Heads]:
        """Yield the tensors of the attention over tokens x (B, N, D), for each group of rows."""
        return heads_of(self.parts.block, self._attention, self.num_heads, self._input(x), rows)

    def _input(self, x: Tensor) -> Tensor:
        """The input of the attention."""
        return getattr(self.parts.block, self.parts.norm1)(x)

    @property
    def _attention(self) -> nn.Module:
        return getattr(self.parts.block, self.parts.attn)


def known_classes(module: str, *names: str) -> tuple[type, ...]:
    """Return the named classes if `module` is imported; otherwise no instance can exist."""
    classes = (getattr(sys.modules.get(module), name, None) for name in names)
    return tuple(cls for cls in classes if cls is not None)


def base_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a block's library defines: pruned blocks are of a subclass."""
    return getattr(type(module), "cropr_base", type(module))


class EngineRefusal(Exception):
    """The engine leaves a block to its own forward; the message is the reason."""


def require_plain(parts: BlockParts) -> None:
    """Raise EngineRefusal if a block has other layers, hooks or parametrizations than its library
    gave it."""
    norms = (
        nn.LayerNorm,
        nn.RMSNorm,
        *known_classes("timm.layers.norm", "LayerNorm", "RmsNorm"),
        *parts.norm_classes,
    )
    for name in (parts.norm1, parts.norm2):
        norm = getattr(parts.block, name)
        if type(norm) not in norms or len(getattr(norm, "normalized_shape", (0,))) != 1:
            raise EngineRefusal(
                f"{name} is {type(norm).__name__}, not LayerNorm or RMSNorm over the width"
            )
    for name in parts.opened:
        layer = getattr(getattr(parts.block, parts.attn), name, None)
        known = is_plain_linear(layer) or type(layer) in (nn.LayerNorm, nn.Identity)
        if layer is not None and not known:
            raise EngineRefusal(f"{name} is {type(layer).__name__}")
    for module in (parts.block, *(submodule.module for submodule in parts.watched())):
        if is_hooked(module):
            raise EngineRefusal(f"forward hooks on {type(module).__name__}")
        if "parametrizations" in module._modules:
            raise EngineRefusal(f"a parametrization of {type(module).__name__}")


def is_hooked(module: nn.Module) -> bool:
    """Tell whether a module has forward hooks of a third party, or another forward than its
    class."""
    # transformers leaves hooks on its blocks that do nothing until hidden states are asked for,
    # `apply` and `prune_image_tokens` their own.
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    quiet = ("transformers.", "cropr_kernels.pruning.model", "cropr_kernels.vlm.")
    if not all(_origin(hook).startswith(quiet) for hook in hooks):
        return True
    forward = vars(module).get("forward")
    return forward is not None and not _origin(forward).startswith("cropr_kernels.vlm.")


def _origin(function: object) -> str:
    """The module in which a function, or that of a partial, is defined."""
    return str(getattr(getattr(function, "func", function), "__module__", ""))
