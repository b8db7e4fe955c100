"""Images of different sizes in one batch, as one by one: lists of images, and patches of NaFlexViT
and SigLIP 2 without their padding."""

import dataclasses
import functools

import pytest
import torch
from helpers.models import (
    BLOCK_RUNNERS,
    SMALL,
    TEXT,
    randomize,
    timm_eva,
    timm_vit,
    transformers,
)

import cropr_kernels as cropr
from cropr_kernels.models.outputs import outputs_of
from cropr_kernels.pruning.maps import counts_by_block
from cropr_kernels.pruning.model import modules_of, run
from cropr_kernels.pruning.state import PruningOptions

pytestmark = pytest.mark.usefixtures("two_threads")
RATE = 6
SIZES = ((64, 64), (32, 96), (96, 64), (64, 64), (40, 48))
CLOSE = dict(rtol=1e-5, atol=1e-6)


def photos(sizes=SIZES, dtype=torch.float64):
    """Return images of these sizes and of different detail."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for index, size in enumerate(sizes):
        noise = torch.randn(1, 3, *[2 ** (1 + index % 4)] * 2, generator=generator, dtype=dtype)
        images.append(torch.nn.functional.interpolate(noise, size=size)[0])
    return images


@functools.cache
def _calibrated(name, llf, merge):
    model = randomize(MODELS[name]()).eval().double()
    cropr.apply(model, rate=RATE, llf=llf, merge=merge)
    return cropr.calibrate(model, torch.stack(photos([(64, 64)] * 4)))


def deployed(name, llf=False, merge=True, **options):
    """Return a deployed copy of a small calibrated model."""
    return cropr.deploy(_calibrated(name, llf, merge), **options)


def naflex(**options):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    name = "naflexvit_base_patch16_gap"
    if not timm.is_model(name):
        pytest.skip(f"not in timm {timm.__version__}: {name}")
    return timm.create_model(name, **{**SMALL, **options})


def siglip2(model):
    t = transformers()
    vision = t.Siglip2VisionConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=128,
        patch_size=8,
        num_patches=64,
        image_size=64,
    )
    if model == "Siglip2VisionModel":
        return t.Siglip2VisionModel(vision)
    config = t.Siglip2Config(vision_config=vision.to_dict(), text_config=TEXT, num_labels=5)
    return getattr(t, model)(config)


BY_IMAGES = {
    "timm ViT": lambda: timm_vit(dynamic_img_size=True),
    "timm ViT, average": lambda: timm_vit(
        dynamic_img_size=True, class_token=False, global_pool="avg"
    ),
    "timm EVA-02": lambda: timm_eva(dynamic_img_size=True, num_reg_tokens=2),
    "DINOv3": BLOCK_RUNNERS["DINOv3"],
}
BY_PATCHES = {
    "NaFlexViT": naflex,
    "NaFlexViT, class token": lambda: naflex(class_token=True, global_pool="token"),
    "NaFlexViT, attention pooling": lambda: naflex(reg_tokens=0, global_pool="map"),
    "NaFlexViT, rotary": lambda: naflex(rope_type="axial", pos_embed="none"),
    "NaFlexViT, DINOv3's rotary": lambda: naflex(
        rope_type="dinov3", pos_embed="none", rope_rotate_half=True, swiglu_mlp=True
    ),
    "SigLIP 2": lambda: siglip2("Siglip2VisionModel"),
    "SigLIP 2, classes": lambda: siglip2("Siglip2ForImageClassification"),
}
MODELS = BY_IMAGES | BY_PATCHES


def padded(name, images, size=8):
    """Return the padded inputs of a batch as the processors of its library make them."""
    patches, places = [], []
    for image in images:
        corners = [
            (top, left)
            for top in range(0, image.shape[1], size)
            for left in range(0, image.shape[2], size)
        ]
        rows = [
            image[:, top : top + size, left : left + size].permute(1, 2, 0).flatten()
            for top, left in corners
        ]
        patches.append(torch.stack(rows))
        places.append(torch.tensor(corners) // size)
    mask = [torch.ones(len(rows)) for rows in patches]
    patches, places, mask = (
        torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
        for values in (patches, places, mask)
    )
    if name.startswith("NaFlexViT"):
        return {"patches": patches, "patch_coord": places, "patch_valid": mask.bool()}
    grids = places.amax(1) + 1
    return {
        "pixel_values": patches,
        "spatial_shapes": grids,
        "pixel_attention_mask": mask.long(),
    }


def alone(model, image):
    return outputs_of(modules_of(model).spec.run(image[None]))


def listed(model, images):
    return [outputs_of(output) for output in cropr.forward_images(model, images)]


@pytest.mark.each_choice
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("llf", [False, True])
@torch.no_grad()
def test_images_of_different_sizes_run_as_one_by_one(name, llf):
    fast = deployed(name, llf)
    images = photos()
    for image, output in zip(images, listed(fast, images)):
        torch.testing.assert_close(output, listed(fast, [image])[0], **CLOSE)
        if image.shape[1:] == (64, 64):
            torch.testing.assert_close(output, alone(fast, image), **CLOSE)
    spec = modules_of(fast).spec
    outputs = listed(cropr.set_rate(fast, 0), images)
    cropr.remove(fast)
    for image, output in zip(images, outputs):
        torch.testing.assert_close(output, outputs_of(spec.run(image[None])), **CLOSE)


SCHEDULES = [cropr.Schedule(rate=RATE), cropr.Schedule(ratio=0.8)]


@pytest.mark.each_choice
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@torch.no_grad()
def test_images_without_thresholds_lose_what_the_schedule_says_as_one_by_one(name, merge, schedule):
    fast = deployed(name, merge=merge)
    modules = modules_of(fast)
    modules.thresholds = None
    modules.config = dataclasses.replace(modules.config, schedule=schedule)
    images = photos()
    for image, output in zip(images, listed(fast, images)):
        torch.testing.assert_close(output, alone(fast, image), **CLOSE)


@pytest.mark.each_choice
@pytest.mark.parametrize("name", BY_PATCHES)
@pytest.mark.parametrize("rate", [0, RATE])
def test_padded_patches_give_what_their_images_do(name, rate):
    fast = cropr.set_rate(deployed(name), rate)
    images = photos()
    expected = listed(fast, images)
    for output, image in zip(listed(fast, padded(name, images)), expected):
        torch.testing.assert_close(output, image, **CLOSE)


@pytest.mark.parametrize("name", BY_PATCHES)
@torch.no_grad()
def test_padded_patches_run_in_a_forward_at_a_rate_of_0_and_are_refused_above(name):
    fast = deployed(name)
    inputs = padded(name, photos())

    def forward(model):
        return model(inputs) if "patches" in inputs else model(**inputs)

    with pytest.raises(ValueError, match=r"without padding, or at a rate of 0, got a \w+ that is"):
        forward(fast)
    assert len(cropr.forward_images(fast, inputs)) == len(SIZES)
    output = outputs_of(forward(cropr.set_rate(fast, 0)))
    torch.testing.assert_close(output, outputs_of(forward(cropr.remove(fast))), **CLOSE)


@pytest.mark.slow
@torch.no_grad()
def test_padded_patches_are_refused_by_a_compiled_model_too():
    compiled = torch.compile(deployed("SigLIP 2"), backend="eager")
    full = padded("SigLIP 2", photos([(64, 64)] * 5))
    assert len(compiled(**full).last_hidden_state) == 5
    with pytest.raises(RuntimeError, match="takes patches without padding, or at a rate of 0, got"):
        compiled(**padded("SigLIP 2", photos()))


@torch.no_grad()
def test_each_image_loses_what_costs_little_within_4_r_and_half_of_its_patches():
    fast = deployed("timm ViT")
    images = photos([(40, 40), (64, 64), (96, 96)])
    budget = modules_of(fast).thresholds.at(RATE)
    options = PruningOptions(engine=True, full=False, budget=budget)
    counts = []
    for image, output in zip(images, cropr.forward_images(fast, images)):
        call = functools.partial(fast, image[None])
        expected, state = run(fast, call, options)
        torch.testing.assert_close(output, expected, **CLOSE)
        counts.append(counts_by_block(state)[0])
    patches = torch.stack(counts) - 1
    lost = -patches.diff(dim=1)
    assert (lost <= torch.minimum(patches[:, :-1] // 2, torch.tensor(4 * RATE))).all()
    assert len({tuple(row) for row in lost.tolist()}) == len(images)


def test_inputs_that_are_no_list_of_images_are_refused():
    fast = deployed("timm ViT")
    with pytest.raises(ValueError, match=r"takes a list of images \(C, H, W\), got a mapping of p"):
        cropr.forward_images(fast, {"patches": torch.zeros(1, 4, 192)})
    assert cropr.forward_images(fast, []) == []
    functional = deployed("timm ViT", engine=False)
    with pytest.raises(ValueError, match="only the engine packs images, and it is off: switched"):
        cropr.forward_images(functional, [])
    dropping = deployed("timm ViT", merge=False)
    with pytest.raises(ValueError, match="rate must be at most 0 for 5 tokens"):
        cropr.forward_images(dropping, photos([(64, 64), (16, 16)]))


def test_patches_of_other_names_or_shapes_are_refused():
    fast = deployed("NaFlexViT")
    inputs = padded("NaFlexViT", photos())
    with pytest.raises(ValueError, match="must come as patches, patch_valid, patch_coord, got pat"):
        cropr.forward_images(fast, {"patches": inputs["patches"]})
    with pytest.raises(ValueError, match=r"patch_coord \(B, N, 2\) or \(B, 2\), got .*\(5, 96\) a"):
        cropr.forward_images(fast, inputs | {"patch_coord": inputs["patch_coord"][:, 1:]})
    none = inputs["patch_valid"].clone()
    none[2] = False
    with pytest.raises(ValueError, match="each image needs a patch in patch_valid, got none in"):
        cropr.forward_images(fast, inputs | {"patch_valid": none})
