"""Rows of image features, in every form in which models give them."""

import pytest
import torch
from helpers import vlm

import cropr_kernels as cropr
from cropr_kernels.vlm.features import entries_of, select_features

ROWS = torch.randn(7, 3)
KEPT = torch.tensor([True, False, True, True, False, False, True])


def output_of(**fields):
    t = vlm.transformers()
    return t.modeling_outputs.BaseModelOutputWithPooling(**fields)


def test_rows_are_selected_in_one_tensor_in_sequences_and_in_sequences_of_these():
    assert [len(entry) for entry in entries_of(ROWS)] == [7]
    assert [len(entry) for entry in entries_of(ROWS.split([4, 3]))] == [4, 3]
    hidden = torch.randn(9, 3)
    flat = select_features(output_of(pooler_output=ROWS, last_hidden_state=hidden), KEPT)
    assert torch.equal(flat.pooler_output, ROWS[KEPT]) and flat.last_hidden_state is hidden
    split = select_features(output_of(pooler_output=ROWS.split([4, 3])), KEPT)
    assert [len(entry) for entry in split.pooler_output] == [3, 1]
    layers = {"pooler_output": [[ROWS.split([4, 3])], (2, ROWS.split([5, 2]))]}
    nested = select_features(output_of(**layers), KEPT).pooler_output
    assert torch.equal(torch.cat(list(nested[0][0])), ROWS[KEPT])
    assert nested[1][0] == 2 and torch.equal(torch.cat(list(nested[1][1])), ROWS[KEPT])


@pytest.mark.parametrize("shape", [(6, 3), (2, 5, 3), (7,)])
def test_tensors_of_other_rows_pass(shape):
    other = torch.randn(shape)
    output = select_features(output_of(pooler_output=[other], last_hidden_state=other), KEPT)
    assert torch.equal(output.pooler_output[0], other)


def test_images_in_one_tensor_keep_equally_many():
    rows = torch.randn(2, 4, 3)
    kept = torch.tensor([True, False, True, False, False, True, True, False])
    assert entries_of(rows)[1].shape == (4, 3)
    selected = select_features(output_of(pooler_output=rows), kept).pooler_output
    assert torch.equal(selected, torch.stack([rows[0, [0, 2]], rows[1, [1, 2]]]))
    kept[0] = False
    with pytest.raises(ValueError, match=r"must keep equally many tokens, got \[1, 2\]"):
        select_features(output_of(pooler_output=rows), kept)


def test_rows_beside_the_fields_of_an_output_are_selected():
    output = vlm.transformers().modeling_outputs.BaseModelOutput(last_hidden_state=ROWS)
    output.pooler_output = ROWS.split([4, 3])
    selected = select_features(output, KEPT)
    assert torch.equal(torch.cat(selected.pooler_output), ROWS[KEPT])
    assert selected.last_hidden_state is ROWS and len(output.pooler_output[0]) == 4


def test_a_model_whose_images_are_no_pixels_is_refused():
    t = vlm.transformers()
    model = vlm.make("LLaVA")

    class Patches(type(model.model)):
        def get_image_features(self, image_patches):
            raise NotImplementedError

    model.model.__class__ = Patches
    assert isinstance(model, t.LlavaForConditionalGeneration)
    with pytest.raises(TypeError, match="its images are no pixel_values"):
        cropr.prune_image_tokens(model, 0.5)


def test_transformers_that_repeats_positions_is_refused(monkeypatch):
    model = vlm.make("LLaVA")
    name = "_prepare_position_ids_for_generation"
    monkeypatch.delattr(vlm.transformers().GenerationMixin, name)
    with pytest.raises(TypeError, match=r"repeats the last of the positions .* 5\.2 or newer"):
        cropr.prune_image_tokens(model, 0.5)
