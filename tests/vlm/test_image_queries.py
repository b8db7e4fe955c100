"""Queries for image tokens in closed form."""

import pytest
import torch
from helpers import vlm
from helpers.vlm_towers import Recorder, dense_attention, same_segment

import cropr_kernels as cropr
from cropr_kernels.calibration import ranks
from cropr_kernels.vlm.packed import blocks_of, find_tower
from cropr_kernels.vlm.shortening import shorten


def attention_of_text(model, inputs):
    """Return the mean attention (B, L) of the text after the image to each column, with eager
    attention of the model itself."""
    model.set_attn_implementation({"text_config": "eager"})
    attentions = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation({"text_config": "sdpa"})
    return torch.stack(attentions).mean((0, 2))  # (B, L, L)


@torch.no_grad()
def test_the_query_is_the_ridge_regression_to_what_the_text_looks_at():
    model = vlm.make("LLaVA")
    inputs = vlm.inputs_for("LLaVA")
    attention = attention_of_text(model, inputs)
    gram = torch.zeros(32, 32, dtype=torch.float64)
    moment = torch.zeros(32, dtype=torch.float64)
    features = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    for sample, rows in enumerate(features.pooler_output):
        columns = (inputs["input_ids"][sample] == vlm.IMAGE).nonzero().squeeze(1)
        target = attention[sample, columns[-1] + 1 :].mean(0)[columns]
        centered = rows.double() - rows.double().mean(0)
        gram += centered.T @ centered
        moment += centered.T @ ranks(target[None])[0]
    query = torch.linalg.solve(gram + 0.01 * gram.diagonal().mean() * torch.eye(32), moment)
    cropr.prune_image_tokens(model, 0.5)
    cropr.calibrate_image_tokens(model, [inputs])
    expected = (query / query.norm()).float()
    torch.testing.assert_close(model.cropr_image_tokens.query, expected, rtol=1e-3, atol=1e-3)
    model.set_attn_implementation({"text_config": "eager"})
    cropr.calibrate_image_tokens(model, [inputs])
    torch.testing.assert_close(model.cropr_image_tokens.query, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "Qwen3-VL"])
@torch.no_grad()
def test_queries_of_a_packed_tower_are_the_regression_to_what_later_blocks_look_at(name):
    model = vlm.make(name)
    inputs = vlm.inputs_for(name, images=(2, 1))
    tower = find_tower(model)
    recorder = Recorder(tower)
    model(**inputs)
    recorder.remove()
    num_groups = (inputs["image_grid_thw"].prod(1) // 4).tolist()
    attended = []
    for block, (x, kwargs) in zip(blocks_of(tower), recorder.arguments):
        tables = kwargs["position_embeddings"]
        probabilities, _ = dense_attention(block, x, same_segment(kwargs, len(x)), tables)
        attended.append(probabilities.mean(0).sum(0).unflatten(0, (-1, 4)).mean(1))
    cropr.prune_image_tokens(model, tower=cropr.Schedule(ratio=0.9))
    cropr.calibrate_image_tokens(model, [inputs])
    for layer, query in enumerate(model.cropr_image_tokens.tower.queries):
        gram = torch.zeros(32, 32, dtype=torch.float64)
        moment = torch.zeros(32, dtype=torch.float64)
        rows = recorder.arguments[layer + 1][0].double().unflatten(0, (-1, 4)).mean(1)
        target = torch.stack(attended[layer + 1 :]).mean(0)
        for groups, values in zip(rows.split(num_groups), target.split(num_groups)):
            centered = groups - groups.mean(0)
            gram += centered.T @ centered
            moment += centered.T @ ranks(values[None])[0]
        expected = torch.linalg.solve(gram + 0.01 * gram.diagonal().mean() * torch.eye(32), moment)
        expected = (expected / expected.norm()).float()
        torch.testing.assert_close(query, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["LLaVA", "SmolVLM", "Gemma3", "Qwen2.5-VL", "Qwen3-VL"])
@torch.no_grad()
def test_calibrated_tokens_get_more_attention_than_evenly_spaced_ones(name):
    model = vlm.make(name)
    batches = [vlm.inputs_for(name, images=(2, 1), texts=(3, 5))] * 2
    packed = name in vlm.PACKED
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tower = cropr.Schedule(ratio=0.9) if packed else None
    cropr.prune_image_tokens(model, 0.5, tower=tower)
    even = kept_attention(model, batches[0])
    cropr.calibrate_image_tokens(model, batches)
    assert not model.training
    assert kept_attention(model, batches[0]) > even
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if packed:
        assert model.cropr_image_tokens.tower.queries.shape == (3, 32)
        assert model(**batches[0]).logits.isfinite().all()


def kept_attention(model, inputs):
    """Return the attention of the text to the image tokens that would be kept, by eager attention
    of the unpruned model."""
    tokens = model.cropr_image_tokens
    tower, tokens.tower = tokens.tower, None
    if tower is not None:
        keep, tower.schedule = tower.schedule, cropr.Schedule(rate=0)
    _, columns = shorten(model, inputs, None, True)
    tokens.keep, share = 1.0, tokens.keep
    attention = attention_of_text(model, inputs)
    tokens.keep, tokens.tower = share, tower
    if tower is not None:
        tower.schedule = keep
    total = 0.0
    for sample, index in enumerate(columns.index):
        ids = inputs["input_ids"][sample]
        text = (ids != vlm.IMAGE).nonzero().squeeze(1)
        last = int((ids == vlm.IMAGE).nonzero().max())
        row = attention[sample, text[text > last]].mean(0)
        kept = index[index >= 0]
        total += float(row[kept[ids[kept] == vlm.IMAGE]].sum())
    return total


def test_refusals_of_calibration_name_the_reason():
    model = vlm.make("LLaVA")
    inputs = vlm.inputs_for("LLaVA")
    with pytest.raises(TypeError, match="image tokens are not pruned"):
        cropr.calibrate_image_tokens(model, [inputs])
    cropr.prune_image_tokens(model, 0.5)
    with pytest.raises(ValueError, match="ridge must be positive"):
        cropr.calibrate_image_tokens(model, [inputs], ridge=0)
    with pytest.raises(ValueError, match="at least one image, with text after it, got none"):
        cropr.calibrate_image_tokens(model, [])
    with pytest.raises(ValueError, match="at least one image, with text after it, got none"):
        cropr.calibrate_image_tokens(model, [{"input_ids": inputs["input_ids"][:, 66:]}])
    last = {key: value[:, :66] if value.ndim == 2 else value for key, value in inputs.items()}
    with pytest.raises(ValueError, match="at least one image, with text after it, got none"):
        cropr.calibrate_image_tokens(model, [last])


def values_alone(module, query, key, value, attention_mask, **kwargs):
    """Attention that computes no softmax: nothing shows what a token looks at."""
    groups = query.shape[1] // value.shape[1]
    return value.repeat_interleave(groups, 1).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("text_config", "the language model's attention must be scaled_dot_product_attention"),
        ("vision_config", "block 0 must attend over its 128 rows, attended over 0"),
    ],
)
def test_attention_that_is_not_seen_is_refused(part, message):
    t = vlm.transformers()
    t.AttentionInterface.register("values_alone", values_alone)
    model = vlm.make("InternVL")
    model.set_attn_implementation({part: "values_alone"})
    cropr.prune_image_tokens(model, tower=cropr.Schedule(ratio=0.9))
    with pytest.raises(ValueError, match=message):
        cropr.calibrate_image_tokens(model, [vlm.inputs_for("InternVL")])
