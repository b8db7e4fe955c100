"""Wall time and FLOPs of vision-language models with fewer image tokens: prefill and 16 tokens.

python -m benchmarks.models.vlm [--models smolvlm_256m qwen2_5_vl_small] [--rounds 3] [--minutes 6]
[--out FILE]

Random weights, one prompt with an image and 64 text tokens, shares of image tokens that are dropped
behind the tower, or inside a packed one, by the engine after calibration. Ratios within a run,
interleaved. FLOPs are those of the prefill, tower included.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cropr_kernels as cropr
from benchmarks.utils.results import RESULTS, Results, environment
from benchmarks.utils.timing import interleaved, keep_memory, quantile
from cropr_kernels.utils.flops import flop_counter
from cropr_kernels.utils.optional import import_optional
from cropr_kernels.vlm.packed import PackedTower
from cropr_kernels.vlm.pooled import PooledTower

IMAGE = 5  # the id of a placeholder
NUM_TEXT = 64
NUM_NEW = 16
QWEN_SIDE = 37  # image tokens on a side of 1,036 pixels
NUM_TILES = 17  # of a large image
RATES = (0.0, 0.5, 0.75)  # shares of image tokens that are dropped
Inputs = dict[str, Any]


def smolvlm_256m(tiles: int = 2, scale: int = 1) -> tuple[Any, Inputs]:
    """SmolVLM-256M's shapes, with fewer tiles than the 17 of a large image; `scale` divides
    them."""
    t: Any = import_optional("transformers", "test", "benchmarks.models.vlm")
    vision = t.SmolVLMVisionConfig(
        hidden_size=768 // scale,
        intermediate_size=3072 // scale,
        num_hidden_layers=12 // scale,
        num_attention_heads=12 // scale,
        image_size=512 // scale,
        patch_size=16,
    )
    text = t.LlamaConfig(
        hidden_size=576 // scale,
        intermediate_size=1536 // scale,
        num_hidden_layers=30 // scale,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49280 // scale,
        pad_token_id=2,
    )
    config = t.SmolVLMConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=4, pad_token_id=2
    )
    side = 512 // scale
    ids = [10]
    for _ in range(tiles):
        ids += [7, *[IMAGE] * (side // 64) ** 2]
    inputs = {"pixel_values": torch.randn(1, tiles, 3, side, side)}
    return t.SmolVLMForConditionalGeneration(config), inputs | _prompt(ids)


def qwen2_5_vl_small(size: int = 560, scale: int = 1) -> tuple[Any, Inputs]:
    """Qwen2.5-VL's structure: windows, 2 x 2 merger, 3-D positions; `size` pixels a side."""
    t: Any = import_optional("transformers", "test", "benchmarks.models.vlm")
    size //= scale
    vision = dict(
        hidden_size=320,
        depth=8,
        num_heads=4,
        intermediate_size=864,
        out_hidden_size=512,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=112,
        fullatt_block_indexes=[1, 3, 5, 7],
    )
    text = dict(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=32000,
        rope_parameters={
            "rope_type": "default",
            "mrope_section": [8, 12, 12],
            "rope_theta": 1e6,
        },
        pad_token_id=2,
    )
    config = t.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )
    side = size // 14
    prompt = _prompt([10, 7, *[IMAGE] * (side * side // 4)])
    inputs = {
        "pixel_values": torch.randn(side * side, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, side, side]]),
        "mm_token_type_ids": (prompt["input_ids"] == IMAGE).long(),
    }
    return t.Qwen2_5_VLForConditionalGeneration(config), inputs | prompt


def _prompt(ids: list[int]) -> Inputs:
    row = torch.tensor([[*ids, *range(20, 20 + NUM_TEXT)]])
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}


MODELS: dict[str, Callable[..., tuple[Any, Inputs]]] = {
    "smolvlm_256m": smolvlm_256m,
    "qwen2_5_vl_small": qwen2_5_vl_small,
}


def inside_schedule(num_groups: int, depth: int, keep: float) -> cropr.Schedule:
    """Equal steps down to the share `keep` of the groups of an image."""
    pruned = (1 - keep) * num_groups / (depth - 1)
    return cropr.Schedule(keep=[round(num_groups - pruned * layer) for layer in range(1, depth)])


def counted() -> list[dict[str, Any]]:
    """Rows of the models whose FLOPs are counted and which are not run."""
    rows: list[dict[str, Any]] = []
    qwen = qwen2_5_vl_7b_flops
    smolvlm = smolvlm_256m_flops
    for name, image_tokens, inside, flops in (
        ("llava_1_5_7b", 576, False, llava_1_5_7b_flops),
        ("qwen2_5_vl_7b", QWEN_SIDE**2, False, qwen),
        ("qwen2_5_vl_7b", QWEN_SIDE**2, True, partial(qwen, inside=True)),
        ("smolvlm_256m_17", NUM_TILES * 64, False, smolvlm),
        ("smolvlm_256m_17", NUM_TILES * 64, True, partial(smolvlm, inside=True)),
    ):
        full = flops(image_tokens)
        for rate in RATES[inside:]:
            count = round(image_tokens * (1 - rate))
            rows.append(
                {
                    "model": name,
                    "dropped": rate,
                    "inside": inside,
                    "prompt tokens": count + NUM_TEXT,
                    "times fewer FLOPs": round(full / flops(count), 3),
                }
            )
    return rows


def llava_1_5_7b_flops(image_tokens: int, text_tokens: int = NUM_TEXT) -> int:
    """FLOPs of a prefill of LLaVA-1.5-7B, tower included, counted on shapes alone."""
    t: Any = import_optional("transformers", "test", "benchmarks.models.vlm")
    with torch.device("meta"):
        model = t.LlavaForConditionalGeneration(t.LlavaConfig())
        with flop_counter() as tower, torch.no_grad():
            model.model.get_image_features(torch.empty(1, 3, 336, 336))
        layers = decoder_flops(model.model.language_model, image_tokens + text_tokens)
    return int(tower.get_total_flops() + layers)


@torch.no_grad()
def decoder_flops(decoder: Any, count: int) -> int:
    """FLOPs of all layers of a decoder on the meta device, for `count` tokens."""
    head = decoder.config.hidden_size // decoder.config.num_attention_heads
    with flop_counter() as layer:
        decoder.layers[0](
            torch.empty(1, count, decoder.config.hidden_size),
            position_embeddings=(torch.empty(1, count, head), torch.empty(1, count, head)),
            attention_mask=None,
        )
    return int(len(decoder.layers) * layer.get_total_flops())


@torch.no_grad()
def smolvlm_256m_flops(image_tokens: int, *, inside: bool = False) -> int:
    """FLOPs of a prefill of SmolVLM-256M with 17 tiles, tower included, counted on shapes alone."""
    with torch.device("meta"):
        model = smolvlm_256m(NUM_TILES)[0].model
        tower = model.vision_model
        blocks = list(tower.encoder.layers)
        if inside:
            schedule = inside_schedule(64, len(blocks), image_tokens / (64 * NUM_TILES))
            PooledTower(blocks, model.config.scale_factor, schedule)
        total = decoder_flops(model.text_model, image_tokens + NUM_TEXT)
        with flop_counter() as counter:
            tower.embeddings.patch_embedding(torch.empty(NUM_TILES, 3, 512, 512))
            x = torch.empty(NUM_TILES, 1024, tower.config.hidden_size)
            model.connector(tower.encoder(inputs_embeds=x).last_hidden_state)
    return int(total + counter.get_total_flops())


def qwen2_5_vl(vision: dict[str, Any], text: dict[str, Any]) -> Any:
    """Make a Qwen2.5-VL with the towers of Qwen2.5-VL-7B in all but widths."""
    t: Any = import_optional("transformers", "test", "benchmarks.models.vlm")
    common = dict(
        depth=32,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
    )
    config = t.Qwen2_5_VLConfig(
        vision_config=common | vision,
        text_config=dict(num_attention_heads=28, num_key_value_heads=4) | text,
        image_token_id=IMAGE,
    )
    return t.Qwen2_5_VLModel(config)


@torch.no_grad()
def qwen2_5_vl_7b_flops(image_tokens: int, *, inside: bool = False) -> int:
    """FLOPs of a prefill of Qwen2.5-VL-7B at 1,036 pixels a side, tower included.

    Blocks are counted on shapes alone, with the segments of a tower of the same depth and windows
    whose rows are 16 wide, in which evenly spaced groups stay.
    """
    segments = qwen2_5_vl_segments(image_tokens if inside else QWEN_SIDE**2)
    vision = dict(hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584)
    with torch.device("meta"):
        model = qwen2_5_vl(
            vision, dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28)
        )
        total = decoder_flops(model.language_model, image_tokens + NUM_TEXT)
        rows = 4 * QWEN_SIDE**2
        with flop_counter() as counter:
            model.visual.patch_embed(torch.empty(rows, 3 * 2 * 14 * 14))
            model.visual.merger(torch.empty(rows, 1280))
        total += counter.get_total_flops()
        # Blocks differ in weights only, and the FLOPs of a block are the sum of its segments'
        lengths = Counter(length for ends in segments for length in ends.diff().tolist())
        for length, repeats in lengths.items():
            ends, table = torch.tensor([0, length], device="cpu"), torch.empty(length, 80)
            with flop_counter() as counter:
                model.visual.blocks[0](
                    torch.empty(length, 1280), cu_seqlens=ends, position_embeddings=(table, table)
                )
            total += repeats * counter.get_total_flops()
    return int(total)


@cache
@torch.no_grad()
def qwen2_5_vl_segments(image_tokens: int) -> list[Tensor]:
    """The ends of segments in each block of Qwen2.5-VL-7B's tower, if so many tokens leave it."""
    model = qwen2_5_vl(
        dict(hidden_size=16, intermediate_size=16, num_heads=1, out_hidden_size=28),
        dict(hidden_size=28, intermediate_size=28, num_hidden_layers=1, vocab_size=32),
    )
    schedule = inside_schedule(QWEN_SIDE**2, 32, image_tokens / QWEN_SIDE**2)
    PackedTower(model.visual, schedule)
    segments: list[Tensor] = []
    for block in model.visual.blocks:
        block.register_forward_pre_hook(
            lambda block, args, kwargs: segments.append(kwargs["cu_seqlens"]), with_kwargs=True
        )
    side = 2 * QWEN_SIDE
    model.visual(torch.randn(side**2, 3 * 2 * 14 * 14), grid_thw=torch.tensor([[1, side, side]]))
    return segments


class Variant:
    """A model at one setting, which is switched on for each call: all share the weights."""

    def __init__(self, model: Any, inputs: Inputs, rate: float, inside: bool):
        self.model = model
        self.inputs = inputs
        self.rate = rate
        self.inside = inside
        self.queries: Tensor | None = None  # inside the tower

    def switch_on(self) -> None:
        if self.inside:
            grid = self.inputs["image_grid_thw"][0]
            depth = len(self.model.model.visual.blocks)
            schedule = inside_schedule(int(grid.prod()) // 4, depth, 1 - self.rate)
            cropr.prune_image_tokens(self.model, tower=schedule)
            tower = self.model.cropr_image_tokens.tower
            if self.queries is None:
                cropr.calibrate_image_tokens(self.model, [self.inputs])
                self.queries = tower.queries
            tower.queries = self.queries
        elif self.rate:
            cropr.prune_image_tokens(self.model, 1 - self.rate)

    def switch_off(self) -> None:
        if self.rate:
            cropr.restore_image_tokens(self.model)

    @torch.inference_mode()
    def seconds(self, new_tokens: int = NUM_NEW) -> float:
        keep_memory()
        self.switch_on()
        try:
            start = time.perf_counter()
            ids = self.model.generate(
                **self.inputs,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
            )
            seconds = time.perf_counter() - start
        finally:
            self.switch_off()
        if ids.shape[1] != self.inputs["input_ids"].shape[1] + new_tokens:
            raise RuntimeError(f"generated {tuple(ids.shape)}, not {new_tokens} tokens; not timed")
        return seconds

    @torch.inference_mode()
    def flops(self) -> tuple[int, int]:
        """FLOPs of the prefill, and the tokens that the language model sees."""
        self.switch_on()
        try:
            with flop_counter() as counter:
                logits = self.model(**self.inputs).logits
        finally:
            self.switch_off()
        return int(counter.get_total_flops()), logits.shape[1]


def measure(
    name: str, model: Any, inputs: Inputs, rounds: int, minutes: float | None = None
) -> list[dict[str, Any]]:
    """Rows of all variants of a model: time by medians, as ratios to no pruning."""
    packed = "image_grid_thw" in inputs
    settings = [(rate, False) for rate in RATES]
    if packed:
        settings += [(rate, True) for rate in RATES if rate]
    variants = {setting: Variant(model.eval(), inputs, *setting) for setting in settings}
    flops = {setting: variant.flops() for setting, variant in variants.items()}
    start = time.monotonic()
    for variant in variants.values():  # warm-up
        variant.seconds()
    turn = time.monotonic() - start
    if minutes is not None:
        rounds = max(1, min(rounds, int(60 * minutes / turn) - 1))
    calls = {setting: variant.seconds for setting, variant in variants.items()}
    times = interleaved(calls, rounds)
    plain = quantile(times[0.0, False], 0.5)
    rows: list[dict[str, Any]] = []
    for setting in settings:
        rate, inside = setting
        median = quantile(times[setting], 0.5)
        rows.append(
            {
                "model": name,
                "dropped": rate,
                "inside": inside,
                "prompt tokens": flops[setting][1],
                "times fewer FLOPs": round(flops[0.0, False][0] / flops[setting][0], 3),
                "times faster": round(plain / median, 3),
                "p10 p90": [
                    round(plain / quantile(times[setting], share), 3) for share in (0.9, 0.1)
                ],
                "rounds": rounds,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=5.0, help="of timing, for all models")
    parser.add_argument("--scale", type=int, default=1, help="divides the sizes, to try the script")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_vlm.json")
    options = parser.parse_args()
    results = Results(options.out, environment("cpu"), keys=("model", "dropped", "inside"))
    results.replace([row for row in results.rows if row["model"] in MODELS] + counted())
    for name in options.models:
        torch.manual_seed(0)
        model, inputs = MODELS[name](scale=options.scale)
        minutes = options.minutes / len(options.models)
        rows = measure(name, model, inputs, options.rounds, minutes)
        results.replace([row for row in results.rows if row["model"] != name] + rows)
        for row in rows:
            print(row, flush=True)


if __name__ == "__main__":
    main()
