"""Forwards that take no features, as those of transformers before 5.18, and those that do."""

import copy
import inspect

import pytest
import torch
from helpers import vlm
from helpers.vlm import GREEDY

import cropr_kernels as cropr
from cropr_kernels.vlm.answers import repeat_answers, takes_features

TAKEN = "mm_encoder_outputs"


def earlier(model):
    """Return the model with a forward that takes no features."""
    forward = type(model).forward
    if TAKEN in inspect.signature(forward).parameters:

        class Earlier(type(model)):
            def forward(self, *args, **kwargs):
                return forward(self, *args, **kwargs)

        parameters = inspect.signature(forward).parameters.values()
        kept = [parameter for parameter in parameters if parameter.name != TAKEN]
        Earlier.forward.__signature__ = inspect.Signature(kept)
        Earlier.__name__ = type(model).__name__
        model.__class__ = Earlier
    return model


@pytest.mark.parametrize("name", ["LLaVA", "LLaVA-OneVision", "Gemma3", "SmolVLM", "Qwen3-VL"])
@torch.no_grad()
def test_a_forward_that_takes_no_features_gives_the_same(name):
    torch.manual_seed(2)
    query = torch.randn(32)
    plain = vlm.make(name)
    if not takes_features(plain):
        pytest.skip("transformers before 5.18 have no other forward")
    inputs = vlm.inputs_for(name, images=(1, 1))
    model = cropr.prune_image_tokens(vlm.make(name), 0.4, query=query)
    other = cropr.prune_image_tokens(earlier(vlm.make(name)), 0.4, query=query)
    assert not takes_features(other)
    greedy = {**GREEDY, "suppress_tokens": [vlm.IMAGE, 6]}  # a random model may write them
    beams = {**greedy, "num_beams": 3, "num_return_sequences": 2}
    copied = copy.deepcopy(other)
    for case in (greedy, beams, {**greedy, "use_cache": False}):
        expected = model.generate(**inputs, **case)
        assert torch.equal(other.generate(**inputs, **case), expected)
        assert torch.equal(copied.generate(**inputs, **case), expected)
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    for pruned in (model, other):
        cropr.calibrate_image_tokens(pruned, [inputs])
    torch.testing.assert_close(other.cropr_image_tokens.query, model.cropr_image_tokens.query)
    other.cropr_image_tokens.keep = 1.0
    assert torch.equal(other.generate(**inputs, **GREEDY), plain.generate(**inputs, **GREEDY))

    with pytest.raises(ValueError, match="they must be equally many"):
        other(**inputs | {"input_ids": inputs["input_ids"].clamp_max(4)})
    assert other.cropr_image_tokens.probe.outputs is None
    pixels = {label: inputs[label] for label in inputs if label.startswith(("pixel", "image"))}
    features = [
        vlm.rows_of(part.model.get_image_features(**pixels, return_dict=True).pooler_output)
        for part in (other, plain)
    ]
    assert torch.equal(*features)
    cropr.restore_image_tokens(other)
    assert torch.equal(other(**inputs).logits, plain(**inputs).logits)
    assert not [name for name in vars(other.model) if name.startswith("get_")]


def test_features_are_repeated_row_by_row():
    t = vlm.transformers()
    model = cropr.prune_image_tokens(vlm.make("LLaVA"), 0.5)
    probe = model.cropr_image_tokens.probe
    rows = [torch.full((2, 3), float(index)) for index in range(3)]
    inner = torch.zeros(3, 5)
    deepstack = [torch.cat(rows), tuple(rows)]  # rows of all images, and images
    probe.prompt = torch.tensor([[vlm.IMAGE] * 4, [1, vlm.IMAGE, vlm.IMAGE, 1]])
    output = t.modeling_outputs.BaseModelOutputWithPooling(
        pooler_output=rows, last_hidden_state=inner
    )
    probe.outputs = {"image": output}
    output.deepstack_features = deepstack
    output.num_tiles = 3  # neither rows nor entries
    output.tiles = torch.arange(7)
    repeat_answers(model, model.cropr_image_tokens, 4)
    flat, split = probe.outputs["image"].deepstack_features
    assert flat[::2, 0].tolist() == [0, 1, 0, 1, 2, 2] and torch.equal(flat, torch.cat(split))
    entries = probe.outputs["image"].pooler_output
    assert [float(entry[0, 0]) for entry in entries] == [0, 1, 0, 1, 2, 2]
    assert probe.outputs["image"].last_hidden_state is inner
    assert probe.outputs["image"].num_tiles == 3
    assert torch.equal(probe.outputs["image"].tiles, torch.arange(7))
    probe.prompt = torch.tensor([[vlm.IMAGE] * 4, [1, vlm.IMAGE, vlm.IMAGE, 1]])
    probe.outputs["image"] = t.modeling_outputs.BaseModelOutputWithPooling(
        pooler_output=torch.stack(rows)
    )
    repeat_answers(model, model.cropr_image_tokens, 4)
    assert probe.outputs["image"].pooler_output[:, 0, 0].tolist() == [0, 1, 0, 1, 2, 2]
