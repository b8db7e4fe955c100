"""FLOPs of encoders with window attention, and of the same if every window were pruned equally.

python -m benchmarks.models.windows [--kept 75 50 25] [--out benchmarks/results/windows.json]

Nothing runs: the models of transformers are on the meta device. After each block but the last every
window drops as many tokens, as `cropr.apply` prunes all of them but SAM 2; blocks over the full map
see all that are left, and pruned tokens are restored with the change of their parents at the end.
The arithmetic is checked against the FLOPs that PyTorch counts in the unpruned blocks, and in tests
in pruned ones.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.utils.results import RESULTS, Results, environment
from cropr_kernels.utils.flops import flop_counter


@dataclass(frozen=True)
class Blocks:
    """Blocks of one width over one map, of which those in windows may be pruned.

    Args:
        grid: patches on a side.
        window: patches on a side of a window.
        windowed: whether a block attends within windows, for each block.
        dim, hidden: widths of the tokens and of the MLP.
        relative: queries are multiplied with a table of relative rows and one of columns.
        extra: other FLOPs of a token in a block.
    """

    grid: int
    window: int
    windowed: tuple[bool, ...]
    dim: int
    hidden: int
    relative: bool = False
    extra: int = 0

    def sides(self) -> list[int]:
        """Rows of each row of windows that are on the map: the last may reach over its edge."""
        return [min(self.window, self.grid - start) for start in range(0, self.grid, self.window)]

    def sizes(self) -> list[int]:
        """Tokens on the map in each window."""
        return [height * width for height in self.sides() for width in self.sides()]

    def flops(self, rate: int) -> int:
        """Count the FLOPs of all blocks if each window drops so many tokens after each but the
        last; those at the edge lose none until the others hold as few."""
        total = 0
        for layer, windowed in enumerate(self.windowed):
            kept = self.window**2 - rate * layer
            sizes = [min(size, kept) for size in self.sizes()]
            total += self._pruned(windowed, sizes) if rate and layer else self._unpruned(windowed)
            if rate and layer < len(self.windowed) - 1:
                left = kept - rate
                # Scores, and the cosines to the tokens that stay
                pruned = [size for size in sizes if size > left]
                total += sum(2 * (size + (size - left) * left) * self.dim for size in pruned)
        return total

    def _unpruned(self, windowed: bool) -> int:
        """FLOPs of a block on the full map."""
        tokens = self.grid**2
        # Windows are rows of a batch, so positions over the edge take part in attention
        rows = len(self.sides()) ** 2 if windowed else 1
        row_length = self.window**2 if windowed else tokens
        side = self.window if windowed else self.grid
        per_token = 8 * self.dim**2 + 4 * row_length * self.dim
        per_token += 4 * side * self.dim * self.relative + self.extra
        return rows * row_length * per_token + 4 * tokens * self.dim * self.hidden

    def _pruned(self, windowed: bool, sizes: list[int]) -> int:
        """FLOPs of a block on as many tokens of each window."""
        tokens = sum(sizes)
        side = self.window if windowed else self.grid
        distances = 2 * side - 1
        per_token = 8 * self.dim**2 + 4 * distances * self.dim * self.relative + self.extra
        total = tokens * (per_token + 4 * self.dim * self.hidden)
        if not windowed:
            return total + 4 * tokens**2 * self.dim
        # Keys over the edge are all alike, and projected once
        over_edge = [self.window**2 - size for size in self.sizes()]
        total += 6 * self.dim**2 * any(over_edge)
        pairs = sum(size * (size + over) for size, over in zip(sizes, over_edge))
        return total + 4 * pairs * self.dim

    def rate_for(self, kept: float) -> int:
        """The rate at which the last block sees about this share of the tokens of a window."""
        return round((1 - kept) * self.window**2 / (len(self.windowed) - 1))


@dataclass(frozen=True)
class Encoder:
    """A model of transformers and those of its blocks that could be pruned."""

    model: nn.Module
    modules: list[nn.Module]
    blocks: Blocks
    size: int  # of images, in pixels


def sam(size: int = 1024, **options: object) -> Encoder:
    from transformers import SamVisionConfig, SamVisionModel

    config = SamVisionConfig(image_size=size, **options)
    model = SamVisionModel(config)
    windowed = tuple(i not in config.global_attn_indexes for i in range(config.num_hidden_layers))
    blocks = Blocks(
        size // config.patch_size,
        config.window_size,
        windowed,
        config.hidden_size,
        config.mlp_dim,
        relative=True,
    )
    return Encoder(model, list(model.vision_encoder.layers), blocks, size)


def vitdet(size: int = 1024, window: int = 14, **options: object) -> Encoder:
    from transformers import VitDetConfig, VitDetModel

    config = VitDetConfig(
        image_size=size,
        window_size=window,
        window_block_indices=[0, 1, 3, 4, 6, 7, 9, 10],
        use_relative_position_embeddings=True,
        **options,
    )
    model = VitDetModel(config)
    windowed = tuple(i in config.window_block_indices for i in range(config.num_hidden_layers))
    blocks = Blocks(
        size // config.patch_size,
        window,
        windowed,
        config.hidden_size,
        config.mlp_ratio * config.hidden_size,
        relative=True,
    )
    return Encoder(model, list(model.encoder.layer), blocks, size)


def sam2(size: int = 1024, **options: object) -> Encoder:
    """Only the third stage: the others hold one or two blocks, and stages pool the full map."""
    from transformers import Sam2HieraDetConfig, Sam2HieraDetModel

    config = Sam2HieraDetConfig(image_size=[size, size], **options)
    model = Sam2HieraDetModel(config)
    first = sum(config.blocks_per_stage[:2])
    indices = range(first + 1, first + config.blocks_per_stage[2])  # the first one pools
    dim = config.embed_dim_per_stage[2]
    blocks = Blocks(
        size // 16,
        config.window_size_per_stage[2],
        tuple(i not in config.global_attention_blocks for i in indices),
        dim,
        int(dim * config.mlp_ratio),
        extra=2 * config.num_attention_heads_per_stage[2] * dim,  # a product that is not used
    )
    return Encoder(model, [model.blocks[i] for i in indices], blocks, size)


def sam3(size: int = 1008, **options: object) -> Encoder:
    from transformers import Sam3ViTConfig, Sam3ViTModel

    config = Sam3ViTConfig(image_size=size, **options)
    model = Sam3ViTModel(config)
    windowed = tuple(i not in config.global_attn_indexes for i in range(config.num_hidden_layers))
    blocks = Blocks(
        size // config.patch_size,
        config.window_size,
        windowed,
        config.hidden_size,
        config.intermediate_size,
    )
    return Encoder(model, list(model.layers), blocks, size)


ENCODERS: dict[str, Callable[..., Encoder]] = {
    "SAM, ViT-B": sam,
    "ViTDet, ViT-B": vitdet,
    "SAM 2, Hiera-T": sam2,
    "SAM 3, ViT-L+": sam3,
}


def count(encoder: Encoder, images: Tensor) -> tuple[int, int]:
    """Count the FLOPs of the unpruned model, and those in the blocks that could be pruned.

    Raises:
        RuntimeError: the arithmetic gives another number for these blocks.
    """
    in_blocks = 0
    before = 0

    with flop_counter() as counter:

        def start(module: nn.Module, args: object) -> None:
            nonlocal before
            before = counter.get_total_flops()

        def end(module: nn.Module, args: object, output: object) -> None:
            nonlocal in_blocks
            in_blocks += counter.get_total_flops() - before

        handles = [module.register_forward_pre_hook(start) for module in encoder.modules]
        handles += [module.register_forward_hook(end) for module in encoder.modules]
        encoder.model(images)
        for handle in handles:
            handle.remove()
        total = counter.get_total_flops()
    expected = encoder.blocks.flops(0)
    if in_blocks != expected:
        raise RuntimeError(f"PyTorch counts {in_blocks} FLOPs in the blocks, and not {expected}")
    return total, in_blocks


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kept", type=int, nargs="+", default=[75, 50, 25], metavar="PERCENT")
    parser.add_argument("--out", type=Path, default=RESULTS / "windows.json")
    options = parser.parse_args()
    results = Results(options.out, environment("cpu"))
    for name, make in ENCODERS.items():
        with torch.device("meta"):
            encoder = make()
            images = torch.empty(1, 3, encoder.size, encoder.size)
        total, in_blocks = count(encoder, images)
        for kept in options.kept:
            rate = encoder.blocks.rate_for(kept / 100)
            ratio = total / (total - in_blocks + encoder.blocks.flops(rate))
            row = {
                "encoder": name,
                "size": encoder.size,
                "GFLOPs": round(total / 1e9, 1),
                "share": round(in_blocks / total, 3),
                "kept": kept,
                "rate": rate,
                "FLOPs": round(ratio, 3),
            }
            results.add(row)
            print(row)


if __name__ == "__main__":
    main()
