"""The engine inside towers that pack their images, against the functional path."""

import copy
import pickle

import pytest
import torch
from helpers import vlm
from helpers.vlm import GREEDY, rows_of

import cropr_kernels as cropr
from cropr_kernels.vlm.packed import find_tower
from cropr_kernels.vlm.packed_engine import PackedRun, runs_packed

PACKED = sorted(vlm.PACKED)
RATIO = cropr.Schedule(ratio=0.8)


@pytest.fixture
def steps(monkeypatch):
    """Layers of towers that the engine has run, in order, without trials of single blocks."""
    layers = []
    step = PackedRun.step

    def counted(self, layer, *args):
        if len(self.blocks) > 1:
            layers.append(layer)
        return step(self, layer, *args)

    monkeypatch.setattr(PackedRun, "step", counted)
    return layers


def pruned(name, merge=False, schedule=RATIO):
    model = cropr.prune_image_tokens(vlm.make(name), tower=schedule, merge=merge)
    torch.manual_seed(3)
    model.cropr_image_tokens.tower.queries = torch.randn(3, 32)
    return model


def with_functional_path(model):
    """Return the model with a hook inside a block, which the engine would not call."""
    find_tower(model).blocks[0].attn.register_forward_hook(lambda module, args, output: None)
    return model


def tower_output(model, pixels, grid):
    """Return rows, rows of deepstack, and sizes that the tower hands on."""
    inner = model.cropr_image_tokens.tower
    output, sizes = inner.features(
        lambda: model.model.get_image_features(pixels, grid, return_dict=True)
    )
    deepstack = getattr(output, "deepstack_features", None) or ()
    return [rows_of(features) for features in (output.pooler_output, *deepstack)], sizes


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_the_engine_of_a_packed_tower_equals_its_functional_path(name, merge, steps):
    inputs = vlm.inputs_for(name, images=(2, 1))
    model = pruned(name, merge)
    functional = with_functional_path(pruned(name, merge))
    assert inputs["image_grid_thw"].prod(1).unique().numel() == 2  # counts differ
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    rows, sizes = tower_output(model, pixels.clone(), grid)
    assert steps == [0, 1, 2, 3]
    expected, expected_sizes = tower_output(functional, pixels.clone(), grid)
    assert len(steps) == 4 and len(rows) == (3 if name == "Qwen3-VL" else 1)
    for part, other in zip(rows, expected):
        assert part.isnan().any()
        torch.testing.assert_close(part, other, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(sizes, expected_sizes)
    assert sizes.max() > 1 if merge else sizes.max() == 1
    logits = model(**inputs).logits
    torch.testing.assert_close(logits, functional(**inputs).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.generate(**inputs, **GREEDY), functional.generate(**inputs, **GREEDY))


UNEVEN = {
    "images of one group": (RATIO, [[1, 2, 2], [1, 8, 8], [1, 2, 2]]),
    "one module of three": (cropr.Schedule(keep=[16, 5, 5]), [[1, 8, 8], [1, 8, 8]]),
    "frames of a video": (RATIO, [[2, 4, 4], [1, 4, 8]]),
}


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("case", UNEVEN)
@torch.no_grad()
def test_images_and_modules_that_prune_nothing_run_beside_others(case, merge, steps):
    schedule, grids = UNEVEN[case]
    grid = torch.tensor(grids)
    model = pruned("Qwen2.5-VL", merge, schedule)
    functional = with_functional_path(pruned("Qwen2.5-VL", merge, schedule))
    torch.manual_seed(5)
    pixels = torch.randn(int(grid.prod(1).sum()), 48)
    rows, sizes = tower_output(model, pixels, grid)
    assert steps == [0, 1, 2, 3]
    expected, expected_sizes = tower_output(functional, pixels, grid)
    assert rows[0].isnan().any() and rows[0].isfinite().any()
    torch.testing.assert_close(rows[0], expected[0], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(sizes, expected_sizes)


@torch.no_grad()
def test_a_tower_that_prunes_nothing_is_equal_to_the_bit_after_calibration(steps):
    inputs = vlm.inputs_for("Qwen2.5-VL")
    model = pruned("Qwen2.5-VL", schedule=cropr.Schedule(rate=0))
    assert torch.equal(model(**inputs).logits, vlm.make("Qwen2.5-VL")(**inputs).logits)
    assert not steps


def eager(model, inputs):
    model.set_attn_implementation({"vision_config": "eager"})
    return model(**inputs).logits


def hooked(model, inputs):
    return with_functional_path(model)(**inputs).logits


def hooked_block(model, inputs):
    find_tower(model).blocks[1].register_forward_hook(lambda module, args, output: None)
    return model(**inputs).logits


def with_gradients(model, inputs):
    with torch.enable_grad():
        return model(**inputs).logits.detach()


def capturing(model, inputs):
    tower = find_tower(model)
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    states = tower(pixels, grid_thw=grid, output_hidden_states=True).hidden_states
    lengths = [len(state) for state in states]
    assert lengths[:4] == sorted(set(lengths), reverse=True)  # the last has all rows
    return model(**inputs | {"pixel_values": pixels}).logits


@pytest.mark.parametrize("manner", [eager, hooked, hooked_block, with_gradients, capturing])
@torch.no_grad()
def test_calls_that_look_inside_blocks_take_the_functional_path(manner, steps):
    inputs = vlm.inputs_for("Qwen2.5-VL")
    expected = pruned("Qwen2.5-VL")(**inputs).logits
    assert steps == [0, 1, 2, 3]
    logits = manner(pruned("Qwen2.5-VL"), inputs)
    assert steps == [0, 1, 2, 3] * (2 if manner is capturing else 1)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_autocast_takes_the_functional_path(steps):
    inputs = vlm.inputs_for("Qwen2-VL")
    model = pruned("Qwen2-VL")
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**inputs).logits.isfinite().all()
    assert not steps


@torch.no_grad()
def test_sixteen_bit_towers_run_in_the_engine(steps):
    inputs = vlm.inputs_for("GLM-4V")
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    model = pruned("GLM-4V", merge=True).bfloat16()
    rows, _ = tower_output(model, inputs["pixel_values"], inputs["image_grid_thw"])
    assert steps == [0, 1, 2, 3]
    functional = with_functional_path(pruned("GLM-4V", merge=True).bfloat16())
    expected, _ = tower_output(functional, inputs["pixel_values"], inputs["image_grid_thw"])
    both = rows[0].isfinite() & expected[0].isfinite()
    assert both.float().mean() > 0.3
    torch.testing.assert_close(rows[0][both], expected[0][both], rtol=0.1, atol=0.1)


@torch.no_grad()
def test_copies_run_their_own_blocks_and_restoring_leaves_none(steps):
    inputs = vlm.inputs_for("Qwen3-VL")
    model = pruned("Qwen3-VL")
    expected = model(**inputs).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs).logits, expected)
        find_tower(other).blocks[1].mlp.linear_fc2.weight.zero_()
        assert not torch.equal(other(**inputs).logits, expected)
    assert len(steps) == 20
    assert torch.equal(model(**inputs).logits, expected)
    cropr.restore_image_tokens(model)
    assert all("forward" not in vars(block) for block in find_tower(model).blocks)
    assert torch.equal(model(**inputs).logits, vlm.make("Qwen3-VL")(**inputs).logits)


@torch.no_grad()
def test_blocks_that_compute_something_else_are_not_run(steps):
    model = vlm.make("Qwen2.5-VL")
    blocks = list(find_tower(model).blocks)
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.float32)
    assert all(runs_packed([block.to(dtype) for block in blocks]) for dtype in dtypes)
    plain = type(blocks[0])

    class Scaled(plain):
        def forward(self, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
            tables = tuple(1.1 * table for table in position_embeddings)
            return 1.1 * super().forward(
                hidden_states, cu_seqlens=cu_seqlens, position_embeddings=tables, **kwargs
            )

    for block in blocks:
        block.__class__ = Scaled
    assert not any(runs_packed([block.to(dtype) for block in blocks]) for dtype in dtypes)
    model.load_state_dict(vlm.make("Qwen2.5-VL").state_dict())
    cropr.prune_image_tokens(model, tower=RATIO)
    inputs = vlm.inputs_for("Qwen2.5-VL")
    cropr.calibrate_image_tokens(model, [inputs])
    assert model(**inputs).logits.isfinite().all() and not steps
    blocks[0].__class__ = plain
    assert not runs_packed(blocks)
    changes = [
        lambda block: block.add_module("norm3", torch.nn.Identity()),
        lambda block: block.attn.add_module("norm", torch.nn.Identity()),
        lambda block: delattr(block.attn, "scaling"),
        lambda block: setattr(block.attn, "num_heads", 3),
    ]
    for change in changes:
        blocks = list(find_tower(vlm.make("Qwen2.5-VL")).blocks)
        assert runs_packed(blocks)
        change(blocks[0])
        assert not runs_packed(blocks)
    with torch.device("meta"):
        assert not runs_packed(list(find_tower(vlm.MODELS["Qwen2.5-VL"]()).blocks))
