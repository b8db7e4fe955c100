"""Models that run their blocks themselves: Hugging Face and torchvision, random weights, small
configurations."""

import copy

import pytest
import torch
from helpers.models import (
    BLOCK_RUNNERS,
    CLASSIFIERS,
    HF,
    MODELS,
    PREFIX,
    TEXT,
    output_and_aux,
    outputs_of,
    randomize,
    torchvision_vit,
    transformers,
)
from torch.nn.functional import cross_entropy

import cropr_kernels as cropr
from cropr_kernels.models.adapters import find_spec
from cropr_kernels.models.arguments import PLAIN, ArgumentRule, Selection, select_arguments
from cropr_kernels.models.blocks import SizeWeightedAttention
from cropr_kernels.pruning.block_wrapper import WrappedBlock

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(params=BLOCK_RUNNERS)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    torch.manual_seed(0)
    return randomize(BLOCK_RUNNERS[name]()).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


def run(model, images):
    """Return the outputs by name, with the same random numbers every time (ViT-MAE shuffles its
    tokens)."""
    torch.manual_seed(1)
    output = model(images)
    return {"logits": output} if isinstance(output, torch.Tensor) else dict(output)


def assert_equal(outputs, expected, **tolerance):
    assert outputs.keys() == expected.keys() and outputs
    for key in outputs:
        torch.testing.assert_close(
            outputs[key], expected[key], **(tolerance or dict(rtol=0, atol=0))
        )


def test_blocks_width_grid_prefix_and_classes_are_found(name, model):
    spec = find_spec(model)
    assert len(spec.blocks) == 4 and spec.dim == 64 and spec.grid == (8, 8)
    assert spec.num_prefix == PREFIX.get(name, 1)
    assert spec.num_classes == (5 if name in CLASSIFIERS else 0)


@pytest.mark.each_choice
@pytest.mark.parametrize("llf", [False, True])
def test_rate_zero_equals_the_plain_model_bit_for_bit(model, images, llf):
    plain = run(model, images)
    assert_equal(run(cropr.apply(model, rate=0, llf=llf), images), plain)


@pytest.mark.each_choice
@pytest.mark.parametrize("llf", [False, True])
def test_apply_then_remove_leaves_nothing_behind(model, images, llf):
    plain, keys, classes = (
        run(model, images),
        list(model.state_dict()),
        [type(module) for module in model.modules()],
    )
    attributes = [set(vars(module)) for module in model.modules()]
    cropr.apply(model, rate=8, llf=llf)
    assert [key for key in model.state_dict() if not key.startswith("cropr.")] == keys
    run(model, images)
    cropr.remove(model)
    assert (
        list(model.state_dict()) == keys and [type(module) for module in model.modules()] == classes
    )
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert_equal(run(model, images), plain)


def slow(model, images, queries, counts, prefix, llf):
    """Return the output of the last block, one image and one token at a time; rotary tables are
    indexed by position."""
    blocks, seen = find_spec(model).blocks, []
    handle = blocks[0].register_forward_pre_hook(
        lambda block, *inputs: seen.append(inputs), with_kwargs=True
    )
    run(model, images)
    handle.remove()
    (args, kwargs), results = seen[0], []
    for b in range(len(images)):
        tokens, left, alive = list(args[0][b]), {}, list(range(args[0].shape[1]))
        for layer, block in enumerate(blocks):
            if llf and layer == len(blocks) - 1:
                everyone = left | dict(zip(alive, tokens))
                alive = sorted(everyone)
                tokens = [everyone[i] for i in alive]
            block_kwargs = dict(kwargs)
            if kwargs.get("position_embeddings") is not None:
                rows = [i - prefix for i in alive[prefix:]]
                block_kwargs["position_embeddings"] = tuple(
                    table[rows] for table in kwargs["position_embeddings"]
                )
            output = block(torch.stack(tokens)[None], *args[1:], **block_kwargs)
            tokens = list((output[0] if isinstance(output, tuple) else output)[0])
            if layer < len(counts):
                scores = [(token @ queries[layer]).item() for token in tokens]
                order = sorted(range(prefix, len(tokens)), key=lambda i, scores=scores: -scores[i])
                stays = {*range(prefix), *order[: counts[layer] - prefix]}
                left |= {alive[i]: tokens[i] for i in range(len(tokens)) if i not in stays}
                tokens, alive = ([values[i] for i in sorted(stays)] for values in (tokens, alive))
        results.append(torch.stack(tokens))
    return torch.stack(results)


def timm_model(name):
    return lambda: pytest.importorskip("timm", reason="timm is not installed").create_model(
        name, depth=4, embed_dim=64, num_heads=2, img_size=128
    )


ORACLE = {
    **BLOCK_RUNNERS,
    "timm EVA-02": MODELS["timm EVA-02"],
    "timm, rotary tables of heads": timm_model("vit_small_patch16_rope_mixed_224"),
    "timm, relative positions": timm_model("vit_relpos_small_patch16_224"),
    "timm BEiT": timm_model("beit_base_patch16_224"),
    "timm, parallel blocks": timm_model("vit_small_patch16_18x2_224"),
}
del ORACLE["ViT-MAE"]  # it shuffles patches


@pytest.mark.parametrize("name", ORACLE)
@torch.no_grad()
def test_dropping_a_token_is_masking_it_in_every_later_block(name):
    torch.manual_seed(0)
    model = randomize(ORACLE[name]()).eval()
    plain = copy.deepcopy(model)
    spec = find_spec(plain)
    images = torch.randn(2, *spec.image_shape)
    cropr.apply(model, rate=9, num_outputs=0)
    lives = cropr.pruning_map(model, images).flatten(1)  # blocks that each patch goes through
    seen = []
    find_spec(model).blocks[-1].register_forward_hook(
        lambda block, inputs, output: seen.append(output)
    )
    run(model, images)
    for layer, block in enumerate(spec.blocks):
        mask = torch.nn.functional.pad((lives <= layer).float() * -1e4, (spec.num_prefix, 0))
        block.forward = masked(block.forward, mask)
    spec.blocks[-1].register_forward_hook(lambda block, inputs, output: seen.append(output))
    run(plain, images)
    got, expected = (output[0] if isinstance(output, tuple) else output for output in seen)
    for b in range(2):
        kept = [*range(spec.num_prefix), *(spec.num_prefix + (lives[b] == 4).nonzero().flatten())]
        torch.testing.assert_close(got[b], expected[b, kept], rtol=1e-4, atol=1e-4)


def masked(forward, log_sizes):
    def call(*args, **kwargs):
        with SizeWeightedAttention(log_sizes):
            return forward(*args, **kwargs)

    return call


IN_FLOAT32 = ("AIMv2",)  # its norm computes in it whatever the dtype


@pytest.mark.each_choice
@pytest.mark.parametrize("llf", [False, True])
@torch.no_grad()
def test_tokens_equal_a_slow_implementation(name, model, images, llf):
    if name == "BEiT":
        pytest.skip("its blocks take all tokens")
    model, images = model.double(), images.double()
    plain = copy.deepcopy(model)
    cropr.apply(model, rate=8, llf=llf)
    known, seen = find_spec(model), []
    counts = model.cropr.config.counts(64 + known.num_prefix, 4, known.num_prefix)
    queries = [module.query().double() for module in model.cropr]
    known.blocks[-1].register_forward_hook(lambda block, inputs, output: seen.append(output))
    run(model, images)
    got = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    tolerance = 1e-5 if name in IN_FLOAT32 else 1e-9
    expected = slow(plain, images, queries, counts, known.num_prefix, llf)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_with_llf_the_last_hidden_state_has_all_tokens(name, model, images):
    plain = run(model, images)
    pruned = run(cropr.apply(model, rate=8, llf=True), images)
    assert {key: value.shape for key, value in pruned.items()} == {
        key: value.shape for key, value in plain.items()
    }


@pytest.mark.each_choice
@pytest.mark.parametrize("llf", [False, True])
def test_training_gives_predictions_and_stops_their_gradient(model, images, llf):
    cropr.apply(model, rate=8, llf=llf, num_outputs=5).train()
    output, aux = output_and_aux(model(images))
    assert len(aux) == len(model.cropr) and all(prediction.shape == (2, 5) for prediction in aux)
    sum(cross_entropy(prediction, torch.tensor([0, 3])) for prediction in aux).backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == key.startswith("cropr."), key
    main = (
        next(iter(output.values()))
        if hasattr(output, "values") and not torch.is_tensor(output)
        else output
    )
    main.square().mean().backward()
    assert all(parameter.grad is not None for parameter in find_spec(model).blocks[0].parameters())
    # Nothing is kept
    assert model.cropr.context.state is None and model.cropr.context.options is None


def test_recomputation_gives_the_same_gradients(images):
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = cropr.apply(BLOCK_RUNNERS["ViT"](), rate=8, llf=True)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        output = model.train()(images)
        (
            output.logits.square().sum()
            + sum(prediction.square().sum() for prediction in output.aux)
        ).backward()
        grads.append({key: parameter.grad for key, parameter in model.named_parameters()})
    assert_equal(
        *({key: grad for key, grad in gradients.items() if grad is not None} for gradients in grads)
    )


@torch.no_grad()
def test_deploy_gives_the_logits_of_eval_and_leaves_its_argument_alone(model, images):
    cropr.apply(model, rate=8, llf=True, num_outputs=5)
    expected, keys = run(model, images), list(model.state_dict())
    fast = cropr.deploy(model)
    assert_equal(run(fast, images), expected, rtol=1e-5, atol=1e-5)
    cropr.set_rate(fast, 12)
    assert fast.cropr.contexts is not model.cropr.contexts and not any(
        p.requires_grad for p in fast.parameters()
    )
    assert_equal(run(model, images), expected)
    assert list(model.state_dict()) == keys and not any(
        "aggregator" in key for key in fast.state_dict()
    )
    cropr.remove(fast)
    assert not any(isinstance(module, WrappedBlock) for module in fast.modules())


@pytest.mark.parametrize(
    ("name", "compiler"),
    [
        ("DINOv3", "aot_eager"),
        *(
            pytest.param(name, "inductor", marks=pytest.mark.slow)
            for name in ("ViT", "DINOv3", "torchvision")
        ),
    ],
)
@torch.no_grad()
def test_compiled_and_exported_models_give_the_same_outputs(model, compiler, images):
    fast = cropr.deploy(cropr.apply(model, rate=8, llf=True))
    expected = run(fast, images)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend=compiler)
    for _ in range(2):
        assert_equal(run(compiled, images), expected, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(fast, (images,)).module()
    assert_equal(run(exported, images), expected, rtol=1e-5, atol=1e-5)


def test_forwards_do_not_affect_each_other(name, model, images):
    cropr.apply(model, rate=8, llf=True)
    with torch.no_grad():
        expected = run(model, images)
        run(model, torch.randn(1, 3, 64, 64))
        assert_equal(run(model, images), expected)


def test_the_vision_tower_of_clip_is_found():
    t = transformers()
    model = t.CLIPModel(t.CLIPConfig(vision_config=HF, text_config=TEXT)).eval()
    cropr.apply(model, rate=8)
    assert find_spec(model).num_prefix == 1 and len(model.cropr) == 3
    with torch.no_grad():
        text = model.get_text_features(input_ids=torch.tensor([[1, 2, 3]]))
    cropr.remove(model)
    with torch.no_grad():
        again = model.get_text_features(input_ids=torch.tensor([[1, 2, 3]]))
    for before, after in zip(
        *((x,) if torch.is_tensor(x) else x.to_tuple() for x in (text, again))
    ):
        assert torch.equal(before, after)


def test_masks_follow_the_tokens():
    alive = torch.tensor([[0, 2, 3], [1, 2, 4]])
    mask = torch.randn(2, 1, 5, 5)
    selection = Selection(alive, 5, 1, lambda table: table, PLAIN)

    def at(value):
        return select_arguments(torch.nn.Identity(), (value,), {}, selection)[0][0]

    got = at(mask)
    for b in range(2):
        assert torch.equal(got[b, 0], mask[b, 0][alive[b]][:, alive[b]])
    assert torch.equal(at(mask[:1, :, :1])[1, 0, 0], mask[0, 0, 0][alive[1]])
    assert at(None) is None
    for index, name in ((0, None), (1, "places")):
        rule = ArgumentRule(positions=(index, "places"))
        args, named = select_arguments(
            torch.nn.Identity(), (None,), {}, selection._replace(rule=rule)
        )
        assert (named[name] if name else args[0]) is alive and len(args) == 1
    with pytest.raises(ValueError, match=r"called with a tensor of shape \(2, 3\)"):
        at(mask[:, 0, 0, :3])


def test_unsupported_models_and_calls_out_of_order_raise(images):
    with pytest.raises(
        ValueError,
        match=r"windows are for timm models and cropr_kernels.ViT, got VisionTransformer",
    ):
        cropr.apply(torchvision_vit(), rate=8, windows=cropr.Windows(4, (3,)), llf=True)
    model = cropr.apply(torchvision_vit(), rate=8)
    with pytest.raises(ValueError, match="pruned already"):
        cropr.apply(model, rate=8)
    with pytest.raises(RuntimeError, match="block 2 of a pruned model ran without those before it"):
        find_spec(model).blocks[2](torch.randn(2, 65, 64))
    x = find_spec(model).blocks[0](torch.randn(2, 65, 64))
    with pytest.raises(RuntimeError, match="block 3 of a pruned model ran without those before it"):
        find_spec(model).blocks[3](x)
    with pytest.raises(
        TypeError,
        match=r"ModuleDict is a module around a model; .* at \.vision_a, ViTForImageClass",
    ):
        cropr.apply(
            torch.nn.ModuleDict(
                {"vision_a": BLOCK_RUNNERS["ViT"](), "vision_b": BLOCK_RUNNERS["ViT"]()}
            ),
            rate=8,
        )
    t = transformers()

    class Pair(t.PreTrainedModel):
        config_class = t.ViTConfig

        def __init__(self):
            super().__init__(t.ViTConfig())
            self.left = BLOCK_RUNNERS["ViT"]()
            self.right = BLOCK_RUNNERS["ViT"]()

    with pytest.raises(TypeError, match=r"Pair has 2 vision towers; give cropr\.apply the one"):
        cropr.apply(Pair(), rate=8)
    text = t.LlamaForCausalLM(t.LlamaConfig(**TEXT))
    with pytest.raises(TypeError, match="cannot be pruned: it has no part that takes images"):
        cropr.apply(text, rate=8)
    with pytest.raises(
        TypeError, match=r"Linear cannot be pruned: a forward of \(1, 3, 224, 224\) fails"
    ):
        cropr.apply(torch.nn.Linear(2, 2), rate=8)
    with pytest.raises(
        ValueError, match="must be a tensor or hold logits, image_embeds, pooler_output, got ViTMAE"
    ):
        cropr.agreement(cropr.apply(BLOCK_RUNNERS["ViT-MAE"]().eval(), rate=8), images, [4])


def test_protected_patches_stay(name, model, images):
    cropr.apply(model, rate=9, num_outputs=0)
    protect = torch.zeros(2, 8, 8, dtype=torch.bool)
    protect[0, 2:4, 1:6] = protect[1, 7] = True
    if name == "ViT-MAE":
        with pytest.raises(
            ValueError, match="not supported for ViTMAEModel: its patches do not stand in the order"
        ):
            model(images, protect=protect)
        return
    left = cropr.pruning_map(model, images, protect=protect)
    assert (left[protect] == 4).all() and (cropr.pruning_map(model, images)[protect] < 4).any()
    before = run(model, images)
    assert not torch.allclose(
        next(iter(run(model, images).values())), model(images, protect=protect)[0]
    )
    assert_equal(run(model, images), before)  # a mask is for one call
    with pytest.raises(
        ValueError, match=r"cropr: protect must be bool of shape .* B = 2 and 64 patches"
    ):
        model(images, protect=protect[:, :3])


EVERY = {**MODELS, **BLOCK_RUNNERS}
PADDABLE = [name for name in EVERY if name not in ("ViT-MAE", "SigLIP", "RADIO", "AIMv2")]


@pytest.mark.each_choice
@pytest.mark.parametrize("name", PADDABLE)
@pytest.mark.parametrize("llf", [False, True])
@torch.no_grad()
def test_the_content_of_padding_changes_nothing(name, llf, images):
    model = cropr.apply(randomize(EVERY[name]()).eval(), rate=8, llf=llf, num_outputs=0)
    padding = torch.zeros(2, 8, 8, dtype=torch.bool)
    padding[0, 6:], padding[1, :, 5:] = True, True
    other = torch.where(
        padding.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None], 9.0, images
    )
    for runner in (model, cropr.deploy(model)):
        outputs = [runner(batch, padding=padding) for batch in (images, other)]
        pooled = [outputs_of(output) for output in outputs]
        torch.testing.assert_close(*pooled, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(outputs_of(runner(images)), pooled[0], rtol=1e-3, atol=1e-3)


@pytest.mark.each_choice
@pytest.mark.parametrize(
    "options", [{}, {"llf": True}, {"merge": True}, {"merge": True, "llf": True}], ids=str
)
@pytest.mark.parametrize("name", BLOCK_RUNNERS)
@torch.no_grad()
def test_the_engine_equals_the_functional_ops(name, options, images):
    model = randomize(BLOCK_RUNNERS[name]()).double().eval()
    images = images.double()
    cropr.apply(model, rate=8, num_outputs=0, **options)
    fast, functional = cropr.deploy(model), cropr.deploy(model, engine=False)
    if name == "BEiT":
        assert fast.cropr.engine_reason == "attention adds a bias that it makes for all tokens"
    else:
        assert fast.cropr.engine is not None, fast.cropr.engine_reason
    tolerance = 1e-5 if name in IN_FLOAT32 else 1e-9
    assert_equal(run(fast, images), run(functional, images), rtol=tolerance, atol=tolerance)


@pytest.mark.each_choice
@pytest.mark.parametrize("llf", [False, True])
@pytest.mark.parametrize("name", [name for name in BLOCK_RUNNERS if name != "ViT-MAE"])
@torch.no_grad()
def test_merged_tokens_cover_all_positions(name, llf, images):
    model = randomize(BLOCK_RUNNERS[name]()).eval()
    plain = run(model, images)
    cropr.apply(model, rate=8, merge=True, llf=llf, num_outputs=0)
    merged = run(model, images)
    assert {key: value.shape for key, value in merged.items()} == {
        key: value.shape for key, value in plain.items()
    }
    tokens = merged.get("last_hidden_state")
    if tokens is not None and not llf:
        where, prefix = cropr.merge_map(model, images).flatten(1), PREFIX.get(name, 1)
        for b in range(2):
            for token in where[b].unique():
                rows = tokens[b, prefix:][where[b] == token]
                assert torch.equal(rows, rows[:1].expand_as(rows))


def test_merging_trains_through_recomputation(images):
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = cropr.apply(randomize(BLOCK_RUNNERS["ViT"]()), rate=8, merge=True)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        output = model.train()(images)
        (
            output.logits.square().sum()
            + sum(prediction.square().sum() for prediction in output.aux)
        ).backward()
        grads.append({key: parameter.grad for key, parameter in model.named_parameters()})
    assert_equal(
        *({key: grad for key, grad in gradients.items() if grad is not None} for gradients in grads)
    )
