"""The zero-copy engine against the functional ops, on every supported family of blocks."""

import copy
import pickle
import re

import pytest
import torch
from helpers.models import MODELS, randomize, reference_vit, timm_eva, timm_model, timm_vit
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cropr_kernels as cropr

pytestmark = pytest.mark.usefixtures("two_threads")


def vit_with_rms_norms():
    model = reference_vit(init_values=0.5)
    for block in model.blocks:
        block.norm1, block.norm2 = (
            nn.RMSNorm(64),
            nn.RMSNorm(64, eps=1e-5, elementwise_affine=False),
        )
    return model


ENGINE_MODELS = {
    **MODELS,
    "reference, qk-norm, LayerScale": lambda: reference_vit(qk_norm=True, init_values=0.5),
    "reference, large EVA-02": lambda: reference_vit(
        rope=True, swiglu=True, scale_mlp=True, qkv="split", global_pool="avg", rope_ref_grid=4
    ),
    "timm ViT, qk-norm": lambda: timm_vit(qk_norm=True, init_values=0.5),
    "timm EVA-02, LayerScale, qk-norm": lambda: timm_eva(init_values=0.5, qk_norm=True),
    "timm EVA-02, half rotation": lambda: timm_eva(rope_rotate_half=True),
    "timm EVA-02, rope attention": lambda: timm_eva(attn_type="rope"),
    "timm EVA-02, registers": lambda: timm_eva(num_reg_tokens=3),
    "reference, RMSNorm": vit_with_rms_norms,
    "timm test_vit4, RmsNorm": lambda: timm_model("test_vit4"),
    "timm AIMv2, RmsNorm": lambda: timm_model("aimv2_large_patch14_224"),
    "timm EVA-02, RMSNorm": lambda: timm_eva(
        norm_layer=nn.RMSNorm, init_values=0.5, attn_only_layer_scale=True
    ),
}
BLOCK_OPS = ("add_norm_", "add_select_")


def both(name, dtype=torch.float64, **schedule):
    """Return the same model on the functional ops and on the engine."""
    model = cropr.apply(randomize(ENGINE_MODELS[name]()).eval().to(dtype), **schedule)
    functional, engine = cropr.deploy(model, engine=False), cropr.deploy(model)
    assert engine.cropr.engine is not None, engine.cropr.engine_reason
    return functional, engine


def called_ops(function):
    """Return the names of the ops of this package that a call dispatches, in order."""
    names = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "cropr":
                names.append(func._schema.name.removeprefix("cropr::"))
            return func(*args, **(kwargs or {}))

    with Record():
        function()
    return names


@pytest.mark.each_choice
@pytest.mark.parametrize("llf", [False, True, "track_parent"])
@pytest.mark.parametrize("name", ENGINE_MODELS)
def test_engine_equals_the_functional_ops(name, llf):
    functional, engine = both(name, rate=8, llf=llf)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(engine(images), functional(images), rtol=1e-9, atol=1e-9)
    features = cropr.features(engine, images)[0], functional.forward_features(images)
    torch.testing.assert_close(*features, rtol=1e-9, atol=1e-9)
    assert features[0].shape[1] == (engine.num_prefix_tokens + 64 if llf else features[1].shape[1])


@pytest.mark.parametrize("name", ENGINE_MODELS)
def test_engine_unpruned_equals_the_model_itself(name):
    model = randomize(ENGINE_MODELS[name]()).eval().double()
    engine = cropr.deploy(cropr.apply(copy.deepcopy(model), rate=0))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(engine(images), model(images), rtol=1e-9, atol=1e-9)
    assert "add_select_" not in called_ops(lambda: engine(images))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 6e-2), (torch.float16, 1e-2)]
)
@pytest.mark.parametrize(
    "name",
    [
        "reference",
        "reference, rotary",
        "reference, RMSNorm",
        "timm ViT, registers",
        "timm AIMv2, RmsNorm",
        "timm EVA-02",
    ],
)
def test_the_engine_in_lower_precision_is_within_its_rounding(name, dtype, tolerance):
    # Unpruned, so that scores within rounding of each other cannot change the selection.
    fused = (
        [{"rate": 8, "llf": "as_pruned"}, {"rate": 8, "llf": "track_parent"}]
        if dtype == torch.float32
        else []
    )
    for schedule in ({"rate": 0}, *fused):
        functional, engine = both(name, dtype, **schedule)
        images = torch.randn(2, 3, 64, 64, dtype=dtype)
        got, expected = engine(images), functional(images)
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_one_selection_a_layer_and_no_row_moves():
    functional, engine = both("timm EVA-02", rate=8, llf=True)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    names = called_ops(lambda: engine(images))
    assert names.count("add_select_") == len(engine.cropr) == 2
    assert not {"prune", "restore", "gather"} & set(names)
    assert "prune" in called_ops(lambda: functional(images))


@pytest.mark.each_choice
@pytest.mark.parametrize("images", [1, 2, 9])
@pytest.mark.parametrize("options", [{}, {"llf": "track_parent"}, {"merge": True}])
def test_a_batch_may_run_in_parts(options, images, monkeypatch):
    _, engine = both("reference", rate=9, **options)
    x = torch.randn(5, 3, 64, 64, dtype=torch.float64)
    protect, padding = (torch.rand(2, 5, 8, 8) < 0.1).unbind()
    for masks in (
        {},
        {"protect": protect},
        {} if "merge" in options else {"protect": protect, "padding": padding},
    ):
        full, tokens = engine(x, **masks), cropr.features(engine, x, **masks)
        calls = len(called_ops(lambda masks=masks: engine(x, **masks)))
        with monkeypatch.context() as patch:
            patch.setattr("cropr_kernels.pruning.engine.CACHE_BYTES", images * 65 * 64 * 8)
            torch.testing.assert_close(engine(x, **masks), full)
            torch.testing.assert_close(cropr.features(engine, x, **masks), tokens)
            assert (
                len(called_ops(lambda masks=masks: engine(x, **masks))) == -(-5 // images) * calls
            )


@pytest.mark.parametrize(
    "schedule", [{"keep": [40, 40, 9]}, {"ratio": 0.5}, {"keep": [65, 65, 65]}, {"rate": 16}]
)
def test_other_schedules_and_sizes_equal_the_functional_ops(schedule):
    functional, engine = both("timm ViT, any size", **schedule)
    size = (64, 64) if "keep" in schedule else (72, 96)
    for batch in (1, 3):
        images = torch.randn(batch, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(engine(images), functional(images), rtol=1e-9, atol=1e-9)


def test_one_engine_serves_many_rates():
    functional, engine = both("reference, rotary", rate=8)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for rate in (4, 12, 0):
        for model in (functional, engine):
            cropr.set_rate(model, rate)
        torch.testing.assert_close(engine(images), functional(images), rtol=1e-9, atol=1e-9)


def test_the_engine_equals_the_functional_ops_under_autocast():
    functional, engine = both("timm ViT", torch.float32, rate=0)
    images = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(engine(images), functional(images), rtol=5e-2, atol=5e-2)


def test_copies_and_pickles_are_independent_and_new_weights_take_effect():
    _, engine = both("timm EVA-02", rate=8)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = engine(images)
    twin = copy.deepcopy(engine)
    assert torch.equal(twin(images), expected)
    assert twin.cropr.engine[0].block is twin.blocks[0]
    with torch.no_grad():
        for parameter in engine.blocks.parameters():
            parameter.zero_()
    assert torch.equal(twin(images), expected)
    assert not torch.equal(engine(images), expected)
    engine.load_state_dict(twin.state_dict(), assign=True)
    assert torch.equal(engine(images), expected)
    fused = pickle.loads(
        pickle.dumps(reference := cropr.deploy(cropr.apply(reference_vit(), rate=8)).cropr.engine)
    )
    assert type(fused[0]) is type(reference[0])


def test_inputs_that_need_a_gradient_take_the_functional_ops():
    _, engine = both("reference", torch.float32, rate=8)
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    names = called_ops(lambda: engine(images))
    assert "prune" in names and "add_select_" not in names
    engine(images).sum().backward()
    assert images.grad.abs().sum() > 0
    with torch.no_grad():
        assert "add_select_" in called_ops(lambda: engine(images))


def test_unfrozen_blocks_raise_as_they_would_not_learn():
    _, engine = both("reference", torch.float32, rate=8)
    engine.blocks[1].mlp.fc1.weight.requires_grad_()
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(RuntimeError, match=r"computes no gradients.*deploy\(model, engine=False\)"):
        engine(images)
    with torch.no_grad():
        assert engine(images).isfinite().all()


def test_maps_of_a_deployed_model_are_those_of_the_model():
    model = cropr.apply(reference_vit().eval(), rate=8, llf=True)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(
        cropr.pruning_map(cropr.deploy(model), images), cropr.pruning_map(model, images)
    )


def test_unsupported_blocks_run_on_the_functional_ops_and_name_the_reason():
    class Odd(nn.LayerNorm):
        pass

    def hooked():
        model = reference_vit()
        model.blocks[2].register_forward_hook(lambda *args: None)
        return model

    def norm_replaced():
        model = reference_vit()
        model.blocks[1].norm2 = Odd(64)
        return model

    def block_replaced():
        model = reference_vit()
        model.blocks[3] = nn.TransformerEncoderLayer(64, 2, batch_first=True)
        return model

    def parametrized():
        model = reference_vit()
        nn.utils.parametrizations.weight_norm(model.blocks[2].attn.proj)
        return model

    def of_attention(change):
        model = timm_vit()
        change(model.blocks[1].attn)
        return model

    class Other(type(timm_vit().blocks[0].attn)):
        pass

    for make, reason in (
        (hooked, "block 2: forward hooks on Block"),
        (parametrized, "block 2: a parametrization of ParametrizedLinear"),
        (
            lambda: of_attention(lambda attn: setattr(attn, "__class__", Other)),
            "block 1: attention is Other",
        ),
        (
            lambda: of_attention(lambda attn: setattr(attn, "gate", nn.Linear(64, 64))),
            "block 1: attention has a gate",
        ),
        (
            lambda: of_attention(lambda attn: setattr(attn, "fused_attn", False)),
            "block 1: attention does not call scaled_dot_product_attention",
        ),
        (norm_replaced, "block 1: norm2 is Odd, not LayerNorm or RMSNorm over the width"),
        (
            block_replaced,
            "block 3: torch.nn.modules.transformer.TransformerEncoderLayer is not a block it knows",
        ),
        (
            lambda: timm_eva(use_post_norm=True),
            "block 0: timm.models.eva.EvaBlockPostNorm is not a block it knows",
        ),
    ):
        model = cropr.apply(make().eval(), rate=0)
        cropr.set_rate(model, 8)
        deployed = cropr.deploy(model)
        assert deployed.cropr.engine_reason == reason
        assert f"engine off ({reason})" in repr(deployed.cropr)
        if make is not block_replaced:
            images = torch.randn(1, 3, 64, 64)
            assert torch.equal(deployed(images), model(images))
    assert "engine on" in repr(cropr.deploy(cropr.apply(reference_vit(), rate=8)).cropr)
    switched_off = cropr.deploy(cropr.apply(reference_vit(), rate=8), engine=False)
    assert "switched off by deploy(engine=False)" in repr(switched_off.cropr)


def test_engine_counts_the_flops_of_the_functional_ops():
    counts = []
    for model in both("timm ViT", torch.float32, rate=8):
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 3, 64, 64))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


# torch.compile


@pytest.mark.parametrize(
    "name",
    [
        "timm ViT",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("reference, rotary", "reference, RMSNorm", "timm EVA-02")
        ),
    ],
)
def test_the_engine_compiles_to_one_graph_and_copies_no_residual_buffer(name):
    torch._dynamo.reset()
    _, engine = both(name, torch.float32, rate=8, llf=True)
    images = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(engine, fullgraph=True)
    with torch.no_grad():
        got, codes = torch._inductor.utils.run_and_get_code(compiled, images)
        torch.testing.assert_close(got, engine(images), rtol=1e-4, atol=1e-5)
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(torch.randn(2, 3, 64, 64))
    # Functionalized and put back in place: every layer works on one buffer, not on a copy of it.
    calls = re.findall(
        r"torch\.ops\.cropr\.(add_norm_|add_select_|add_)\.default\((\w+), ", "\n".join(codes)
    )
    assert len(calls) == 2 * len(engine.blocks)
    assert len({buffer for _, buffer in calls}) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ENGINE_MODELS)
def test_engine_on_cuda_gives_the_cpu_result(name):
    functional, engine = both(name, torch.float32, rate=8, llf=True)
    images = torch.randn(2, 3, 64, 64)
    expected = functional(images)
    with torch.no_grad():
        torch.testing.assert_close(
            engine.cuda()(images.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3
        )


def test_modules_that_override_forward_run_on_the_functional_ops():
    class Last(cropr.Scorer):
        def query(self):
            return torch.zeros(64)

        def forward(self, x, num_keep, num_prefix=0, scores=None, priority=None):
            return cropr.ops.split(
                x, torch.arange(x.shape[1]).float().expand(x.shape[:2]), num_keep, num_prefix
            )

    model = cropr.apply(reference_vit().eval(), rate=8, make_module=lambda layer, block: Last())
    fast, images = cropr.deploy(model), torch.randn(2, 3, 64, 64)
    assert fast.cropr.engine_reason == "Last does not select by its query alone"
    assert torch.equal(fast(images), model(images))
    assert (cropr.pruning_map(fast, images).flatten(1)[:, :9] == 1).all()
    with pytest.raises(ValueError, match="merge selects by queries, and Last does not"):
        cropr.apply(reference_vit(), rate=8, merge=True, make_module=lambda layer, block: Last())
