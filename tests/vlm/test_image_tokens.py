"""Fewer image tokens into a language model: what stays equal, and what a prompt loses."""

import copy
import pickle
import threading

import pytest
import torch

import cropr_kernels as cropr
from cropr_kernels.vlm.api import _shorten
from tests.helpers import vlm

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
CASES = {
    "two rows": {},
    "several images, left padding": {"images": (2, 1), "texts": (3, 5)},
    "right padding": {"images": (1, 1), "texts": (6, 3), "pad": "right"},
}


def masked(model, inputs, columns):
    """Return the inputs of the full prompt with the pruned tokens masked, at true positions."""
    kept = torch.zeros_like(inputs["input_ids"])
    rows, slots = (columns.index >= 0).nonzero().T
    kept[rows, columns.index[rows, slots]] = 1
    return inputs | {"attention_mask": kept * inputs["attention_mask"]}


def pruned(name, keep=0.4, **options):
    model = vlm.make(name)
    torch.manual_seed(2)
    query = torch.randn(32)
    return cropr.prune_image_tokens(model, keep, query=query, **options)


@pytest.mark.parametrize("name", vlm.MODELS)
@torch.no_grad()
def test_keeping_all_is_equal_to_the_bit(name):
    plain = vlm.make(name)
    model = pruned(name, keep=1.0)
    inputs = vlm.inputs_for(name, images=(2, 1))
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(model.generate(**inputs, **GREEDY), plain.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", vlm.MODELS)
@torch.no_grad()
def test_dropping_equals_masking_at_the_same_positions(name, case):
    plain = vlm.make(name)
    model = pruned(name)
    inputs = vlm.inputs_for(name, **CASES[case])
    pad_left = CASES[case].get("pad") != "right"
    shortened, columns = _shorten(model, inputs, None, pad_left)
    assert columns.index.shape[1] < inputs["input_ids"].shape[1]
    plain(**inputs)  # 3-D positions are those of the full prompt
    positions = full_positions(plain, inputs)
    expected = plain(**masked(plain, inputs, columns), position_ids=positions).logits
    logits = model(**inputs).logits
    present = shortened["attention_mask"].bool()
    expected = expected.gather(1, columns.index.clamp_min(0).unsqueeze(-1).expand(-1, -1, 60))
    torch.testing.assert_close(logits[present], expected[present], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(
        logits[present], plain(**inputs).logits.gather(
            1, columns.index.clamp_min(0).unsqueeze(-1).expand(-1, -1, 60)
        )[present]
    )


def full_positions(plain, inputs):
    """Return the positions of the full prompt, as the forward of a model makes them."""
    count = inputs["input_ids"].shape[1]
    if hasattr(plain.model, "get_rope_index"):
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        return plain.model.get_rope_index(**{name: inputs[name] for name in names})[0]
    first = int("PaliGemma" in type(plain).__name__)
    return torch.arange(first, first + count).expand(len(inputs["input_ids"]), -1)


@pytest.mark.parametrize("name", vlm.MODELS)
@torch.no_grad()
def test_generating_equals_masking_at_the_same_positions(name):
    plain = vlm.make(name)
    model = pruned(name)
    inputs = vlm.inputs_for(name, images=(2, 1), texts=(3, 5))
    positions = plain._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
    _, columns = _shorten(model, inputs, positions, True)
    expected = plain.generate(
        **masked(plain, inputs, columns), position_ids=positions, **GREEDY, logits_to_keep=1
    )
    answer = model.generate(**inputs, **GREEDY)
    assert torch.equal(answer, expected)
    assert torch.equal(answer[:, :-4], inputs["input_ids"])
