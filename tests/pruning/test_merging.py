"""Merging in full models: against a slow implementation, on the engine, in training, compiled,
exported."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.models import MODELS, randomize, reference_vit, timm_eva, timm_vit

import cropr_kernels as cropr
from cropr_kernels.models.blocks import (
    attention_by_bias,
    attention_by_dimension,
    attention_by_projection,
    attention_by_rows,
    pads_projection,
    project_heads,
    proportional_attention,
)
from cropr_kernels.pruning.merging import COST_WEIGHT, resolve_parents

WAYS = {
    "default": cropr.Merge(),
    "no choice by redundancy": cropr.Merge(candidates=1),
    "fewer candidates": cropr.Merge(candidates=1.5),
    "sizes do not protect": cropr.Merge(size_weight=0),
}


def slow_logits(model, images, counts, merge):
    """Return logits, one image and one token at a time: tokens are (value, size, patches) in a
    list."""
    with torch.no_grad():
        embedded = model.embed(images)[0]
        return torch.stack([slow_image(model, tokens, counts, merge) for tokens in embedded])


def slow_image(model, tokens, counts, merge):
    prefix = model.num_prefix_tokens
    alive = [(token, 1.0, [position]) for position, token in enumerate(tokens)]
    for layer, block in enumerate(model.blocks):
        x = torch.stack([value for value, _, _ in alive])
        q, k, v = (part[0] for part in project_heads(block.attn, block.norm1(x)[None]))
        logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        logits = logits + 0.9 * torch.tensor([size for _, size, _ in alive], dtype=x.dtype).log()
        heads = logits.softmax(-1) @ v
        x = x + block.ls1(block.attn.proj(heads.transpose(0, 1).flatten(1)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
        alive = [(value, size, patches) for value, (_, size, patches) in zip(x, alive)]
        if layer < len(counts):
            alive = slow_merge(
                alive,
                x,
                model.cropr[layer].query().to(x.dtype),
                counts[layer],
                prefix,
                merge,
                layer,
            )
    rows = torch.empty_like(tokens)
    for value, _, patches in alive:
        rows[patches] = value
    return model.forward_head(model.norm(rows[None]))[0]


def slow_merge(alive, features, query, keep, prefix, merge, layer):
    """Merge one token after the other; a token is at the first of its patches, on a grid of 8 x
    8."""
    scores = [float(value @ query) for value, _, _ in alive]
    patches = torch.tensor(scores[prefix:], dtype=torch.float64)
    mean, spread = patches.mean().item(), patches.std(correction=0).item()
    weighed = [
        score + merge.size_weight * spread * math.log(size)
        for score, (_, size, _) in zip(scores, alive)
    ]
    cells = [patches[0] - prefix for _, _, patches in alive]
    # Of the color that goes first
    first = [(cell // 8 + cell % 8) % 2 == layer % 2 for cell in cells]
    # Least important first
    order = sorted(range(prefix, len(alive)), key=lambda i: (not first[i], weighed[i]))
    candidates = order[: len(alive) - merge.num_targets(len(alive), keep, prefix)]
    targets = [i for i in range(prefix, len(alive)) if i not in candidates]
    nearest, cost = {}, {}
    for i in candidates:
        nearest[i] = max(
            (F.cosine_similarity(features[i], features[j], dim=0).item(), j) for j in targets
        )
        cost[i] = max(1 - nearest[i][0], 0) * math.exp(COST_WEIGHT * (weighed[i] - mean) / spread)
    leaving = sorted(candidates, key=lambda i: cost[i])[: len(alive) - keep]
    merged = dict(enumerate(alive))
    for i in leaving:
        (value, size, patches), (taken, taken_size, taken_patches) = (
            merged.pop(i),
            merged[nearest[i][1]],
        )
        total = size + taken_size
        merged[nearest[i][1]] = (
            (value * size + taken * taken_size) / total,
            total,
            taken_patches + patches,
        )
    for i in {nearest[i][1] for i in leaving}:
        mean, *rest = merged[i]
        merged[i] = (mean * alive[i][0].norm() / mean.norm(), *rest)
    return [merged[i] for i in sorted(merged)]


@pytest.mark.parametrize("merge", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"global_pool": "avg"},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 3, "qk_norm": True},
    ],
    ids=["class token", "average pool", "no class token", "registers"],
)
def test_logits_are_those_of_a_slow_merge(options, merge):
    model = randomize(reference_vit(**options)).double().eval()
    cropr.apply(model, rate=9, merge=merge)
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    counts = model.cropr.config.counts(model.num_prefix_tokens + 64, 4, model.num_prefix_tokens)
    expected = slow_logits(model, images, counts, merge)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(cropr.deploy(model)(images), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.each_choice
@pytest.mark.parametrize("llf", [False, "as_pruned", "track_parent"])
@pytest.mark.parametrize("merge", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_the_engine_equals_the_functional_ops(name, merge, llf):
    model = randomize(MODELS[name]()).double().eval()
    keys = set(model.state_dict())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        plain = model(images)
        cropr.apply(model, rate=8, llf=llf, merge=merge)
        assert {key for key in model.state_dict() if not key.startswith("cropr.")} == keys
        expected = model(images)
        assert not torch.equal(expected, plain)
        torch.testing.assert_close(cropr.deploy(model)(images), expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(cropr.deploy(model, engine=False)(images), expected)
        assert model.forward_features(images).shape[1] == 64 + model.num_prefix_tokens
        assert torch.equal(cropr.set_rate(model, 0)(images), plain)
        cropr.remove(model)
        assert torch.equal(model(images), plain)


# Attention


def attention_problem(dtype, width=16):
    q, k, v = (torch.randn(2, 3, 7, width, dtype=dtype) for _ in range(3))
    return q, k, v, torch.randint(1, 40, (2, 7)).float()


def test_a_token_of_size_s_weighs_as_much_as_s_equal_tokens():
    q, k, v, sizes = attention_problem(torch.float64)
    got = proportional_attention(q, k, v, sizes.log())
    for b in range(2):
        repeated = [part[b].repeat_interleave(sizes[b].long(), dim=1) for part in (k, v)]
        torch.testing.assert_close(
            got[b], F.scaled_dot_product_attention(q[b], *repeated), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("width", [8, 16, 64, 72, 248])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_more_dimension_and_rows_are_exact_against_the_mask(dtype, width):
    q, k, v, sizes = attention_problem(dtype, width)
    exact = attention_by_bias(q.double(), k.double(), v.double(), sizes.log())
    errors = [
        (function(q, k, v, sizes.log()).double() - exact).abs().max().item()
        for function in (attention_by_dimension, attention_by_rows, attention_by_bias)
    ]
    assert max(errors[:2]) <= max(2 * errors[2], 1e-6), errors


def test_on_a_cpu_in_16_bits_rows_attend_where_nothing_else_is_asked_for():
    q, k, v, sizes = attention_problem(torch.bfloat16)
    by_rows = attention_by_rows(q, k, v, sizes.log())
    by_bias = attention_by_bias(q, k, v, sizes.log())
    assert not torch.equal(by_rows, by_bias)
    assert torch.equal(proportional_attention(q, k, v, sizes.log()), by_rows)
    assert torch.equal(proportional_attention(q, k, v), attention_by_rows(q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(proportional_attention(q, k, v, sizes.log()), by_bias)
    leaf = q.clone().requires_grad_()
    proportional_attention(leaf, k, v, sizes.log()).sum().backward()
    assert leaf.grad is not None
    with torch.no_grad():
        assert torch.equal(proportional_attention(leaf, k, v, sizes.log()), by_rows)


def test_sixteen_bit_keys_lose_nothing_of_the_size():
    """With zero queries the weights are the sizes alone, so any error is that of log(size)."""
    v = torch.eye(32, dtype=torch.bfloat16)[None, None]
    q = k = torch.zeros_like(v)
    sizes = torch.arange(1.0, 33.0)[None]
    weights = attention_by_dimension(q, k, v, sizes.log())[0, 0, 0].float()
    torch.testing.assert_close(weights, sizes[0] / sizes.sum(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("make", [reference_vit, timm_vit, lambda: reference_vit(qkv_bias=False)])
def test_attention_with_projected_size_columns_is_the_same(make, monkeypatch):
    """The path of CUDA in 16 bits, on the CPU in float64: attention, and a full network on the
    engine."""
    model = randomize(make()).eval().double()
    attn, x, sizes = (
        model.blocks[0].attn,
        torch.randn(3, 30, 64).double(),
        torch.randint(1, 9, (3, 30)).double(),
    )
    expected = proportional_attention(*project_heads(attn, x), sizes.log())
    torch.testing.assert_close(attention_by_projection(attn, x, sizes.log()), expected)
    images = torch.randn(2, 3, 64, 64).double()
    engine, calls = cropr.deploy(cropr.apply(model, rate=9, merge=True)), []
    expected = engine(images)
    monkeypatch.setattr(
        "cropr_kernels.models.adapters.reference.pads_projection",
        lambda attn, x: calls.append(x) or True,
    )
    torch.testing.assert_close(engine(images), expected)
    assert calls


def test_only_a_plain_joint_projection_is_padded(monkeypatch):
    tokens = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(8, 65, 64))
    assert pads_projection(reference_vit().blocks[0].attn, tokens)
    assert not pads_projection(reference_vit(qk_norm=True).blocks[0].attn, tokens)
    assert not pads_projection(reference_vit(qkv="split").blocks[0].attn, tokens)
    for other in ({"is_cuda": False}, {"dtype": torch.float32}, {"shape": (1, 64, 64)}):
        assert not pads_projection(
            reference_vit().blocks[0].attn, SimpleNamespace(**{**vars(tokens), **other})
        )
    attn = reference_vit().blocks[0].attn
    attn.qkv = type("Lora", (torch.nn.Linear,), {})(64, 192)
    assert not pads_projection(attn, tokens)


def test_gradients_of_both_ways_agree():
    q, k, v, sizes = attention_problem(torch.float64)
    grads = []
    for function in (attention_by_bias, attention_by_dimension):
        leaves = [part.clone().requires_grad_() for part in (q, k, v)]
        function(*leaves, sizes.log()).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flash_attention_takes_the_extra_dimension(dtype):
    q, k, v, sizes = (part.cuda() for part in attention_problem(dtype, 64))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        got = proportional_attention(q, k, v, sizes.log())
    expected = attention_by_bias(q.double(), k.double(), v.double(), sizes.double().log())
    torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=2e-2)


# Outputs


def test_merged_tokens_are_copied_to_all_their_positions():
    model = cropr.apply(randomize(reference_vit()).eval(), rate=9, merge=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens, where = (
            model.forward_features(images)[:, 1:],
            cropr.merge_map(model, images).flatten(1),
        )
        deployed = cropr.deploy(model)
        torch.testing.assert_close(
            cropr.features(deployed, images)[0][:, 1:], tokens, rtol=1e-4, atol=1e-4
        )
        assert torch.equal(cropr.merge_map(deployed, images).flatten(1), where)
    left = cropr.pruning_map(model, images).flatten(1) == 4
    for b in range(2):
        # Those that stayed, in order
        assert where[b, left[b]].tolist() == list(range(int(left[b].sum())))
        for token in where[b].unique():
            assert (tokens[b, where[b] == token] == tokens[b, where[b] == token][0]).all()


def test_an_average_counts_every_patch_once():
    model = cropr.apply(randomize(reference_vit(global_pool="avg")).eval(), rate=9, merge=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens = model.forward_features(images)
        torch.testing.assert_close(model(images), model.head(model.fc_norm(tokens[:, 1:].mean(1))))


def test_merge_maps_need_merging_and_are_the_identity_at_rate_0():
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(
        ValueError,
        match=r"merge_map: the model's tokens do not merge; cropr.apply\(model, ..., merge",
    ):
        cropr.merge_map(cropr.apply(reference_vit().eval(), rate=8), images)
    unmerged = cropr.merge_map(cropr.apply(reference_vit().eval(), rate=0, merge=True), images)
    assert unmerged.flatten().tolist() == list(range(64))


def test_resolve_parents_finds_the_end_of_every_chain():
    parent = torch.tensor([[0, 3, 2, 5, 2, 7, 2, 7]])  # 1 -> 3 -> 5 -> 7
    assert resolve_parents(parent, 3)[0].tolist() == [0, 7, 2, 7, 2, 7, 2, 7]
    assert resolve_parents(parent[:, :1], 0).tolist() == [[0]]


# Options and errors


def test_enough_tokens_are_candidates_and_at_least_one_is_a_target():
    ways = [cropr.Merge(candidates=c) for c in (1, 1.5, 2, 10)]
    for merge, count, prefix in itertools.product(ways, range(2, 60), (0, 1, 5)):
        for keep in range(prefix + 1, count + 1):
            num_targets = merge.num_targets(count, keep, prefix)
            assert prefix < num_targets <= keep
            assert count - num_targets >= count - keep
    assert ways[0].num_targets(50, 40, 1) == 40
    assert ways[1].num_targets(50, 40, 1) == 35
    assert ways[3].num_targets(50, 40, 0) == 25


def test_options_out_of_range_raise():
    with pytest.raises(
        ValueError, match=r"Merge: candidates must be a number that is finite and >= 1, got 0.5"
    ):
        cropr.Merge(candidates=0.5)
    with pytest.raises(
        ValueError, match=r"Merge: size_weight must be a number that is finite and >= 0, got -1"
    ):
        cropr.Merge(size_weight=-1)
    with pytest.raises(
        ValueError, match=r"Merge: candidates must be a number that is finite and >= 1, got nan"
    ):
        cropr.Merge(candidates=float("nan"))


def test_blocks_that_cannot_weigh_tokens_raise():
    model = timm_vit()
    model.blocks[1].attn.forward = lambda x, **kwargs: x
    cropr.apply(model, rate=8, merge=True)
    with pytest.raises(
        ValueError, match=r"merging and padding need attention by scaled_.*, and Block has none"
    ):
        model(torch.randn(1, 3, 64, 64))


def test_eva_attention_with_a_gate_raises():
    pytest.importorskip("timm", reason="timm is not installed")
    try:
        model = timm_eva(gated_attn=True, attn_type="rope")
    except TypeError:
        pytest.skip("this timm has no gated attention")
    with pytest.raises(ValueError, match=r"block 0: attention has a gate"):
        cropr.apply(model, rate=8, merge=True)


def test_the_repr_says_how_tokens_merge():
    assert "Merge(candidates=3.0" in repr(cropr.apply(reference_vit(), rate=8, merge=True).cropr)
    assert "Merge" not in repr(cropr.apply(reference_vit(), rate=8).cropr)


def test_a_deployed_copy_does_not_follow_the_model():
    model = cropr.apply(randomize(reference_vit()).eval(), rate=8, merge=True)
    images = torch.randn(1, 3, 64, 64)
    for engine in (True, False):
        deployed = cropr.deploy(model, engine=engine)
        with torch.no_grad():
            before = deployed(images)
            randomize(model)
            assert torch.equal(deployed(images), before)


def test_a_copied_model_merges_in_its_own_blocks():
    model = cropr.apply(randomize(reference_vit()).eval(), rate=8, merge=True)
    images = torch.randn(1, 3, 64, 64)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = twin(images)
        randomize(model)
        assert torch.equal(twin(images), before)


# Training


@pytest.mark.parametrize("llf", [False, True])
@pytest.mark.parametrize("name", ["reference, registers", "timm ViT, any size", "timm EVA-02"])
def test_training_reaches_every_block_and_the_queries(name, llf):
    torch.manual_seed(1)
    model = cropr.apply(randomize(MODELS[name]()).train(), rate=8, llf=llf, merge=True)
    images, target = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    output, aux = model(images)
    assert len(aux) == len(model.cropr)
    cropr.loss(F.cross_entropy, output, aux, target).backward()
    for parameter in [*model.blocks.parameters(), *model.cropr.parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    model.zero_grad()
    sum(F.cross_entropy(prediction, target) for prediction in model(images)[1]).backward()
    assert all(parameter.grad is None for parameter in model.blocks.parameters())


def test_recomputed_activations_give_the_same_gradients():
    grads = []
    for recompute in (False, True):
        torch.manual_seed(2)
        model = cropr.apply(randomize(timm_vit()).train(), rate=8, merge=True)
        model.set_grad_checkpointing(recompute)
        model(torch.randn(2, 3, 64, 64))[0].square().sum().backward()
        grads.append(model.blocks[0].mlp.fc1.weight.grad)
    torch.testing.assert_close(*grads)


def test_calibration_ignores_merging():
    images = torch.randn(8, 3, 64, 64)
    queries = []
    for merge in (False, True):
        torch.manual_seed(3)
        model = cropr.apply(randomize(reference_vit()).eval(), rate=8, merge=merge)
        cropr.calibrate(model, images)
        queries.append(torch.stack([module.query() for module in model.cropr]))
    assert torch.equal(*queries)


# Compilers


@pytest.mark.parametrize(
    ("engine", "compiler"),
    [
        (True, "aot_eager"),
        *(pytest.param(engine, "inductor", marks=pytest.mark.slow) for engine in (True, False)),
    ],
)
def test_merging_compiles_to_one_graph(engine, compiler):
    torch._dynamo.reset()
    model = cropr.deploy(
        cropr.apply(randomize(reference_vit(global_pool="avg")).eval(), rate=8, merge=True),
        engine=engine,
    )
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-4)


def test_exports_with_the_functional_ops():
    model = cropr.deploy(cropr.apply(randomize(reference_vit()).eval(), rate=8, merge=True))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=1e-4)
    names = {str(node.target) for node in program.graph.nodes}
    assert "cropr.merge.default" in names and "cropr.merge_.default" not in names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_and_autocast_are_near_float32(dtype):
    model = cropr.apply(randomize(reference_vit()).eval(), rate=8, merge=True)
    images = torch.randn(2, 3, 64, 64)
    low = cropr.deploy(model).to(dtype)
    with torch.no_grad():
        exact = model(images)
        assert (low(images.to(dtype)).float() - exact).norm() < 0.2 * exact.norm()
        with torch.autocast("cpu", dtype=dtype):
            assert (cropr.deploy(model)(images).float() - exact).norm() < 0.2 * exact.norm()
