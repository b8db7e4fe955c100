"""Videos: each frame keeps its share of tokens."""

import inspect

import pytest
import torch
from helpers import vlm
from helpers.vlm import GREEDY, masked

import cropr_kernels as cropr
from cropr_kernels.vlm.shortening import shorten

VIDEO = 6  # the id of a placeholder
NAMES = ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "LLaVA-OneVision"]
QWEN = NAMES[:3]


def inputs_with_video(name, image=True):
    """Return inputs of a row with a video of two frames, and before it an image."""
    torch.manual_seed(4)
    if name == "LLaVA-OneVision":
        inputs = {"pixel_values_videos": torch.randn(1, 2, 3, 32, 32)}
        frames = [VIDEO] * 33  # 16 a frame, and a newline
    else:
        inputs = {
            "pixel_values_videos": torch.randn(2 * 64, 48),
            "video_grid_thw": torch.tensor([[2, 8, 8]]),
        }
        frames = [VIDEO] * 32
        if name == "Qwen3-VL":  # a time before each frame
            frames = [7, *[VIDEO] * 16, 8, 30, 7, *[VIDEO] * 16]
    row = [10, 7, *frames, 8, 11, 12, 13]
    if image:
        pixels, [count, *_] = vlm.pixels_for(name, 1)
        inputs |= pixels
        row = [10, 7, *[vlm.IMAGE] * count, 8, *row[1:]]
    ids = torch.tensor([row])
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name in QWEN:
        types = (ids == vlm.IMAGE).long() + 2 * (ids == VIDEO).long()
        inputs["mm_token_type_ids"] = types
    return inputs


def make_with_videos(name):
    """Return a model, if this transformers runs it on a video, pruned or not."""
    model = vlm.make(name)
    if name == "LLaVA-OneVision" and not takes_videos(model):
        pytest.skip("get_video_features of this transformers takes no pixel_values_videos")
    if name == "Qwen3-VL":
        try:
            positions_of(model, inputs_with_video(name))
        except StopIteration:
            pytest.skip("Qwen3-VL of this transformers places no video of several frames")
    return model


def takes_videos(model):
    names = inspect.signature(type(model.model).get_video_features).parameters
    return "pixel_values_videos" in names


def positions_of(plain, inputs):
    return plain._prepare_position_ids_for_generation(
        inputs["input_ids"], {key: value for key, value in inputs.items() if key != "input_ids"}
    )


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_video_is_pruned_frame_by_frame_as_if_masked(name, image):
    plain = make_with_videos(name)
    inputs = inputs_with_video(name, image)
    model = cropr.prune_image_tokens(vlm.make(name), 1.0, query=torch.randn(32))
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(model.generate(**inputs, **GREEDY), plain.generate(**inputs, **GREEDY))

    model.cropr_image_tokens.keep = 0.25
    positions = positions_of(plain, inputs)
    _, columns = shorten(model, inputs, positions, True)
    assert cropr.num_image_tokens(model, 16) == 4
    full_places = (inputs["input_ids"][0] == VIDEO).nonzero().squeeze(1)
    first = torch.isin(full_places[:16], columns.index[0]).sum()
    second = torch.isin(full_places[16:32], columns.index[0]).sum()
    assert first == second == 4
    if name == "LLaVA-OneVision":
        assert full_places[32] in columns.index  # its newline stays
    full = masked(plain, inputs, columns)
    expected = plain(**full, position_ids=positions).logits
    expected = expected.gather(1, columns.index.unsqueeze(-1).expand(-1, -1, 60))
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    options = {**GREEDY, "return_dict_in_generate": True, "output_scores": True}
    answer = model.generate(**inputs, **options)
    others = plain.generate(**full, position_ids=positions, **options)
    assert torch.equal(answer.sequences, others.sequences)
    for scores, other in zip(answer.scores, others.scores):
        torch.testing.assert_close(scores, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", QWEN)
@torch.no_grad()
def test_a_packed_tower_prunes_each_frame(name, merge):
    plain = make_with_videos(name)
    inputs = inputs_with_video(name)
    model = vlm.make(name)
    cropr.prune_image_tokens(model, tower=cropr.Schedule(rate=0), merge=merge)
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    cropr.restore_image_tokens(model)
    cropr.prune_image_tokens(model, tower=cropr.Schedule(ratio=0.8), merge=merge)
    cropr.calibrate_image_tokens(model, [inputs])
    kept = cropr.num_image_tokens(model, 16)
    _, columns = shorten(model, inputs, None, True)
    places = (inputs["input_ids"][0] == VIDEO).nonzero().squeeze(1)
    for frame in places.split(16):
        assert torch.isin(frame, columns.index[0]).sum() == kept == 9
    assert model(**inputs).logits.isfinite().all()
    assert model.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 4


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_videos_calibrate_as_images_do(name):
    model = cropr.prune_image_tokens(make_with_videos(name), 0.5)
    cropr.calibrate_image_tokens(model, [inputs_with_video(name, image=False)])
    assert model.cropr_image_tokens.query.norm() == pytest.approx(1, abs=1e-4)


@torch.no_grad()
def test_refusals_of_videos_name_the_reason():
    model = cropr.prune_image_tokens(vlm.make("GLM-4V"), 0.5)
    inputs = inputs_with_video("Qwen2-VL", image=False)
    inputs["input_ids"][inputs["input_ids"] == VIDEO] = vlm.IMAGE  # as its processor writes them
    with pytest.raises(ValueError, match=r"videos of Glm4v\w+ are not pruned: .* as images"):
        model(**inputs)
    model = vlm.make("Qwen2-VL")

    class Earlier(type(model.model)):
        def get_video_features(self, frames):
            raise NotImplementedError

    model.model.__class__ = Earlier
    cropr.prune_image_tokens(model, 0.5)
    with pytest.raises(ValueError, match="takes no pixel_values_videos; install a newer one"):
        model(**inputs_with_video("Qwen2-VL", image=False))
    model = vlm.make("LLaVA-OneVision")
    if not takes_videos(model):
        cropr.prune_image_tokens(model, 0.5)
        with pytest.raises(ValueError, match="takes no pixel_values_videos; install a newer one"):
            model(**inputs_with_video("LLaVA-OneVision"))
        return
    cropr.apply(model.model.vision_tower, rate=4, num_outputs=0)
    cropr.prune_image_tokens(model)
    with pytest.raises(ValueError, match="pools patches of videos, which its tower prunes singly"):
        model(**inputs_with_video("LLaVA-OneVision", image=False))
