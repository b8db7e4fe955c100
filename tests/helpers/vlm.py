"""Tiny vision-language models with random weights, and inputs for them."""

import inspect

import pytest
import torch

from .models import randomize, transformers

IMAGE = 5  # the id of a placeholder
VISION = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=48,
    image_size=32,
    patch_size=4,
)
TEXT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=48,
    vocab_size=60,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    head_dim=16,
)
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
PACKED = {"Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "GLM-4V"}


def llava():
    t = transformers()
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION),
        text_config=t.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
    )
    return t.LlavaForConditionalGeneration(config)


def llava_next():
    t = transformers()
    config = t.LlavaNextConfig(
        vision_config=t.CLIPVisionConfig(**VISION),
        text_config=t.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 32], [64, 32]],
    )
    return t.LlavaNextForConditionalGeneration(config)


def llava_onevision():
    t = transformers()
    config = t.LlavaOnevisionConfig(
        vision_config=t.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=t.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=6,
        image_grid_pinpoints=[[32, 32], [64, 32]],
        vision_aspect_ratio="anyres_max_9",
    )
    return t.LlavaOnevisionForConditionalGeneration(config)


def paligemma():
    t = transformers()
    config = t.PaliGemmaConfig(
        vision_config=t.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=t.GemmaConfig(**TEXT),
        image_token_index=IMAGE,
        projection_dim=32,
    )
    return t.PaliGemmaForConditionalGeneration(config)


def gemma3():
    t = transformers()
    config = t.Gemma3Config(
        vision_config=t.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=t.Gemma3TextConfig(**TEXT, sliding_window=1024),
        image_token_index=IMAGE,
        mm_tokens_per_image=16,
        boi_token_index=7,
        eoi_token_index=8,
    )
    return t.Gemma3ForConditionalGeneration(config)


def smolvlm(kind="SmolVLM"):
    t = transformers()
    config = getattr(t, f"{kind}Config")(
        vision_config=getattr(t, f"{kind}VisionConfig")(**VISION),
        text_config=t.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return getattr(t, f"{kind}ForConditionalGeneration")(config)


def internvl():
    t = transformers()
    vision = {**VISION, "image_size": [32, 32], "patch_size": [4, 4]}
    config = t.InternVLConfig(
        vision_config=t.InternVLVisionConfig(**vision),
        text_config=t.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
    )
    return t.InternVLForConditionalGeneration(config)


def qwen(kind):
    t = transformers()
    text = {**TEXT, "rope_parameters": MROPE}
    vision = dict(patch_size=4, temporal_patch_size=1, spatial_merge_size=2, depth=4)
    heads = dict(num_heads=2, hidden_size=32, intermediate_size=48, out_hidden_size=32)
    options = {
        "Qwen2VL": dict(embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2),
        "Qwen2_5_VL": dict(**heads, window_size=16, fullatt_block_indexes=[1, 3]),
        "Qwen3VL": dict(**heads, num_position_embeddings=64, deepstack_visual_indexes=[0, 2]),
        "Glm4v": dict(**heads, image_size=32),
    }
    config = getattr(t, f"{kind}Config")(
        vision_config=vision | options[kind],
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
        image_start_token_id=7,
        image_end_token_id=8,
    )
    return getattr(t, f"{kind}ForConditionalGeneration")(config)


MODELS = {
    "LLaVA": llava,
    "LLaVA-NeXT": llava_next,
    "LLaVA-OneVision": llava_onevision,
    "PaliGemma": paligemma,
    "Gemma3": gemma3,
    "SmolVLM": smolvlm,
    "Idefics3": lambda: smolvlm("Idefics3"),
    "InternVL": internvl,
    "Qwen2-VL": lambda: qwen("Qwen2VL"),
    "Qwen2.5-VL": lambda: qwen("Qwen2_5_VL"),
    "Qwen3-VL": lambda: qwen("Qwen3VL"),
    "GLM-4V": lambda: qwen("Glm4v"),
}


def make(name):
    """Return a model with noise on every parameter, in eval mode."""
    torch.manual_seed(0)
    model = MODELS[name]()
    if not hasattr(model, "_prepare_position_ids_for_generation"):
        pytest.skip("transformers is older than 5.2")
    return randomize(model).eval()


def pixels_for(name, num_images):
    """Return the arguments that hold `num_images` images, and the number of tokens of each."""
    if name in PACKED:
        grid = torch.tensor([[1, 8, 8], [1, 4, 8], [1, 8, 4]] * num_images)[:num_images]
        patches = int(grid.prod(1).sum())
        return {
            "pixel_values": torch.randn(patches, 48),
            "image_grid_thw": grid,
        }, (grid.prod(1) // 4).tolist()
    if name == "LLaVA-NeXT":
        sizes = torch.tensor([[32, 32], [64, 32]] * num_images)[:num_images]
        return {
            "pixel_values": torch.randn(num_images, 3, 3, 32, 32),
            "image_sizes": sizes,
        }, [64 + 8 * 9, 64 + 16 * 9] * num_images
    if name == "LLaVA-OneVision":
        sizes = torch.tensor([[32, 32], [64, 32]] * num_images)[:num_images]
        return {
            "pixel_values": torch.randn(num_images, 3, 3, 32, 32),
            "image_sizes": sizes,
            "batch_num_images": torch.ones(num_images, dtype=torch.long),
        }, [64 + 8 * 9, 64 + 16 * 9] * num_images
    tokens = {"SmolVLM": 16, "Idefics3": 16, "InternVL": 16, "Gemma3": 16}.get(name, 64)
    shape = (1, num_images) if name in ("SmolVLM", "Idefics3") else (num_images,)
    return {"pixel_values": torch.randn(*shape, 3, 32, 32)}, [tokens] * num_images


def prompt_of(name, counts, text=4):
    """Return a row of ids: text, then each image between two ids, then text."""
    row = [10]
    for count in counts:
        row += [7, *[IMAGE] * count, 8]
    return row + list(range(11, 11 + text))


def inputs_for(name, images=(1, 1), texts=(4, 4), pad="left"):
    """Return inputs of a batch: rows with so many images and so much text, padded."""
    torch.manual_seed(1)
    pixels, counts = pixels_for(name, sum(images))
    if name in ("SmolVLM", "Idefics3"):
        longest = max(images)
        values = torch.zeros(len(images), longest, 3, 32, 32)
        flat = iter(pixels["pixel_values"][0])
        for row, count in enumerate(images):
            for index in range(count):
                values[row, index] = next(flat)
        pixels["pixel_values"] = values
    rest = iter(counts)
    rows = [
        prompt_of(name, [next(rest) for _ in range(count)], text)
        for count, text in zip(images, texts)
    ]
    length = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        padding = [0] * (length - len(row))
        ids.append(padding + row if pad == "left" else row + padding)
        flags = [1] * len(row)
        mask.append(padding + flags if pad == "left" else flags + padding)
    input_ids = torch.tensor(ids)
    inputs = {"input_ids": input_ids, "attention_mask": torch.tensor(mask), **pixels}
    is_image = (input_ids == IMAGE).long()
    if name in PACKED:
        inputs["mm_token_type_ids"] = is_image
    if name == "Gemma3":
        inputs["token_type_ids"] = is_image
    if name == "PaliGemma":
        inputs["token_type_ids"] = torch.zeros_like(is_image)
    return inputs


def masked(model, inputs, columns):
    """Return the inputs of the full prompt with the pruned tokens masked, at true positions."""
    kept = torch.zeros_like(inputs["input_ids"])
    rows, slots = (columns.index >= 0).nonzero().T
    kept[rows, columns.index[rows, slots]] = 1
    return inputs | {"attention_mask": kept * inputs["attention_mask"]}


def full_positions(plain, inputs):
    """Return the positions of the full prompt, as the forward of a model makes them."""
    count = inputs["input_ids"].shape[1]
    if hasattr(plain.model, "get_rope_index"):
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        return plain.model.get_rope_index(**{name: inputs[name] for name in names})[0]
    first = int("PaliGemma" in type(plain).__name__)
    return torch.arange(first, first + count).expand(len(inputs["input_ids"]), -1)


def forward_with_features(model, inputs, output, **options):
    """Return the logits of a plain model that sees these image features in place of its own."""
    if "mm_encoder_outputs" in inspect.signature(model.forward).parameters:
        inputs = {name: value for name, value in inputs.items() if name != "pixel_values"}
        return model(**inputs, mm_encoder_outputs={"image": output}, **options).logits
    model.model.get_image_features = lambda *args, **kwargs: output
    try:
        return model(**inputs, **options).logits
    finally:
        del model.model.get_image_features


def without_nan(features):
    """Return features, a tensor or nested lists of tensors, with zeros for NaN."""
    if isinstance(features, torch.Tensor):
        return features.nan_to_num()
    return [without_nan(entry) for entry in features]


def rows_of(features):
    """Return the rows (T, D) of features, which are one tensor or one an image."""
    rows = features if isinstance(features, torch.Tensor) else torch.cat(list(features))
    return rows.reshape(-1, rows.shape[-1])


def cache_of(output):
    """Return the cache in an output, by its name today or before transformers 5.24."""
    return getattr(output, "cache", None) or output.past_key_values


def best_of_runs(scores, count):
    """Return the index of the highest of scores (N,) in each of `count` equal runs."""
    runs = [[] for _ in range(count)]
    for index in range(len(scores)):
        runs[index * count // len(scores)].append(index)
    return torch.tensor([max(run, key=lambda index: float(scores[index])) for run in runs])
