"""Linear layers with packed weights: they equal nn.Linear, follow its weights, and step aside for
whatever looks inside."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers.models import reference_vit
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cropr_kernels as cropr
from cropr_kernels.models import packed_linear
from cropr_kernels.models.packed_linear import PackedLinear, pack, packed_weights, unpack
from cropr_kernels.pruning.deployment import deployed_copy

DTYPES = [torch.float32, torch.bfloat16]
INPUTS = {
    "tokens": lambda: torch.randn(2, 37, 48),
    "rows": lambda: torch.randn(5, 48),
    "one token": lambda: torch.randn(48),
    "strided": lambda: torch.randn(7, 3, 96)[:, :, ::2],
    "transposed": lambda: torch.randn(48, 9).t(),
    "expanded": lambda: torch.randn(1, 1, 48).expand(3, 4, 48),
    "four dimensions": lambda: torch.randn(2, 3, 4, 48),
}


def layer(bias=True, dtype=torch.float32):
    return nn.Linear(48, 80, bias=bias).requires_grad_(False).to(dtype)


def packed(linear, x):
    """The output with packed weights."""
    with packed_weights([linear]):
        return linear(x)


def is_packed(linear):
    return getattr(linear, "packed_weight", None) is not None


def assert_equals_plain(linear, x):
    torch.testing.assert_close(packed(linear, x), F.linear(x, linear.weight, linear.bias))


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", INPUTS)
def test_the_output_is_that_of_linear(name, bias, dtype):
    linear, x = layer(bias, dtype), INPUTS[name]().to(dtype)
    output = packed(linear, x)
    assert is_packed(linear) and output.dtype == dtype and output.is_contiguous()
    expected = F.linear(x, linear.weight, linear.bias)
    torch.testing.assert_close(output, expected)
    assert torch.equal(linear(x), expected)  # elsewhere it is nn.Linear


def test_nothing_is_packed_on_other_cpus_than_x86(monkeypatch):
    monkeypatch.setattr(packed_linear.platform, "machine", lambda: "aarch64")
    assert packed_linear._dtypes.__wrapped__() == ()


def test_no_rows_give_none():
    assert packed(layer(), torch.zeros(0, 48)).shape == (0, 80)


CHANGES = {
    "in place": lambda linear: linear.weight.mul_(2),
    "loaded": lambda linear: linear.load_state_dict(nn.Linear(48, 80).state_dict()),
    "assigned": lambda linear: linear.load_state_dict(nn.Linear(48, 80).state_dict(), assign=True),
    "another parameter": lambda linear: setattr(linear, "weight", nn.Parameter(torch.ones(80, 48))),
    "other data": lambda linear: setattr(linear.weight, "data", torch.ones(80, 48)),
    "rounded and back": lambda linear: linear.bfloat16().float(),
    "another bias": lambda linear: linear.bias.add_(1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_parameters_are_seen(name):
    linear, x = layer(), torch.randn(3, 48)
    packed(linear, x)
    CHANGES[name](linear)
    assert_equals_plain(linear, x)


def test_another_dtype_packs_anew():
    linear, x = layer(), torch.randn(3, 48)
    packed(linear, x)
    assert not is_packed(linear.bfloat16())
    assert_equals_plain(linear, x.bfloat16())
    assert_equals_plain(linear.float(), x)


def test_what_looks_inside_sees_a_plain_linear():
    linear, x = layer(), torch.randn(3, 48)
    expected = F.linear(x, linear.weight, linear.bias)
    with FlopCounterMode(display=False) as counter:
        packed(linear, x)
    assert counter.get_total_flops() == 2 * 3 * 48 * 80
    torch.testing.assert_close(torch.func.vmap(lambda row: packed(linear, row))(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed(linear, x).dtype == torch.bfloat16
    torch._C._set_mkldnn_enabled(False)
    try:
        assert torch.equal(packed(linear, x), expected)
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert not is_packed(linear)
    assert torch.equal(torch.jit.trace(lambda x: packed(linear, x), x)(x), expected)


def test_other_threads_are_not_in_the_context():
    linear, x = layer(), torch.randn(3, 48)
    with packed_weights([linear]), ThreadPoolExecutor(1) as pool:
        pool.submit(linear, x).result()
        assert not is_packed(linear)
        linear(x)
    assert is_packed(linear)


def test_a_context_within_another_does_not_end_it():
    linear, x = layer(), torch.randn(3, 48)
    with packed_weights([linear]):
        packed(layer(), x)
        linear(x)
    assert is_packed(linear)


def test_weights_whose_changes_nobody_counts_are_not_packed():
    with torch.inference_mode():
        linear, x = layer(), torch.randn(3, 48)
        packed(linear, x)
        assert not is_packed(linear)
        linear.weight.mul_(2)
        assert_equals_plain(linear, x)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_copies_and_pickles_are_plain_and_hold_one_weight(protocol):
    linear, x = layer(), torch.randn(3, 48)
    packed(linear, x)
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear, protocol))):
        assert type(other) is nn.Linear and "packed_weight" not in vars(other)
        assert torch.equal(other.weight, linear.weight) and torch.equal(other.bias, linear.bias)


def test_layers_of_other_classes_stay():
    class Scaled(nn.Linear):
        pass

    scaled, conv = Scaled(4, 4), nn.Conv2d(3, 3, 1)
    pack([scaled, conv])
    assert type(scaled) is Scaled and type(conv) is nn.Conv2d
    linear = layer()
    packed(linear, torch.randn(3, 48))
    unpack([linear, scaled])
    assert type(linear) is nn.Linear and "packed_weight" not in vars(linear)


def linear_layers(model):
    return [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]


def test_the_engine_packs_and_its_copies_pack_too():
    images = torch.randn(2, 3, 64, 64)
    model = cropr.apply(reference_vit().eval(), rate=5, merge=True, num_outputs=0)
    cropr.calibrate(model, images)
    expected = deployed_copy(model, engine=False, equal_counts=True)(images)
    fast = deployed_copy(model, equal_counts=True)
    torch.testing.assert_close(fast(images), expected, rtol=1e-4, atol=1e-5)
    layers = linear_layers(fast)
    with torch.inference_mode():
        other = deployed_copy(model, equal_counts=True)
        assert torch.equal(other(images), fast(images))
    assert all(map(is_packed, linear_layers(other)))
    assert len(layers) == 16 and all(type(linear) is PackedLinear for linear in layers)
    assert all(is_packed(linear) for linear in layers)
    assert all(type(linear) is nn.Linear for linear in linear_layers(model))
    copied = copy.deepcopy(fast)
    assert torch.equal(copied(images), fast(images))
    assert all(type(linear) is PackedLinear for linear in linear_layers(copied))
    removed = cropr.remove(fast)
    assert all(type(module) is not PackedLinear for module in removed.modules())
