"""Properties of every baseline of the registry, and of the network that runs them."""

import pytest
import torch
import torch.nn.functional as F
from helpers.baselines import COUNTS, DIM, HEADS, KEEP, TOKENS, context_of, counts_for, make
from helpers.models import randomize, reference_vit

import cropr_kernels as cropr
from benchmarks.baselines.learned import ReducedClassifier
from benchmarks.baselines.network import Context, Reduced, Selector, attention_of, patches_of
from benchmarks.baselines.registry import BASELINES, SYSTEMS
from benchmarks.baselines.selection import EViT


@pytest.mark.parametrize("name", SYSTEMS)
def test_prefix_tokens_stay_first_and_unchanged(name):
    x = torch.randn(3, TOKENS, DIM)
    for prefix in (1, 3):
        reducer, context = (
            SYSTEMS[name](DIM, KEEP - prefix, TOKENS - prefix).eval(),
            context_of(x, prefix),
        )
        context = context._replace(patches=reducer.prepare(context.patches))
        reduction = reducer(x, context, KEEP, prefix)
        assert torch.equal(reduction.tokens[:, :prefix], x[:, :prefix])
        assert reduction.tokens.shape[1] == KEEP or name == "ATS, trimmed"


@pytest.mark.parametrize("name", SYSTEMS)
def test_without_reduction_every_system_is_the_plain_model(name):
    model, images = randomize(reference_vit(init_values=0.1)).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(Reduced(model, SYSTEMS[name], [65, 65, 65])(images), model(images))


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "ATS, trimmed"])
def test_every_system_keeps_the_counts_of_its_schedule(name):
    network, seen = make(name), []
    for block in network.backbone.blocks:
        block.norm1.register_forward_hook(
            lambda module, inputs, output: seen.append(output.shape[1])
        )
    with torch.no_grad():
        network(torch.randn(2, 3, 64, 64))
    assert seen == [65, *counts_for(name)]


@pytest.mark.parametrize(
    "name", [baseline.name for baseline in BASELINES if baseline.category == "merging"]
)
@pytest.mark.parametrize("prefix", [1, 2, 3])
@pytest.mark.parametrize("depth", [0.0, 0.75])
def test_merged_tokens_are_the_means_of_the_tokens_of_their_row(depth, prefix, name):
    x = torch.randn(3, TOKENS, DIM)
    context = context_of(
        x, prefix, None if name == "DPC-KNN" else torch.randint(1, 5, (3, TOKENS)).float(), depth
    )
    reduction = SYSTEMS[name](DIM, KEEP - prefix, TOKENS - prefix)(x, context, KEEP, prefix)
    sizes = torch.ones(3, TOKENS) if context.sizes is None else context.sizes
    mass = F.one_hot(reduction.rows(), KEEP).float() * sizes.unsqueeze(2)
    total = mass.sum(1)
    torch.testing.assert_close(reduction.tokens, mass.transpose(1, 2) @ x / total.unsqueeze(2))
    assert name == "DPC-KNN" or torch.equal(reduction.sizes, total)


def test_a_network_whose_tokens_merge_covers_all_positions():
    images = torch.randn(2, 3, 64, 64)
    for name, covers in [("ToMe", True), ("PiToMe", True), ("ATC", True), ("SAINT", False)]:
        with torch.no_grad():
            features = make(name).run(images)
        full = features.full()
        assert (full is not None) == covers
        if full is not None:
            assert full.shape[1] == 65 and torch.equal(full[:, 0], features.tokens[:, 0])
            assert len(torch.unique(full[0], dim=0)) == COUNTS[-1]


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_same_seed_gives_the_same_bits(name):
    network, images, outputs = make(name, init_values=0.1), torch.randn(2, 3, 64, 64), []
    for _ in range(2):
        torch.manual_seed(3)
        with torch.no_grad():
            outputs.append(network(images))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_trained_parameter_gets_a_gradient_under_autocast(name):
    network = Reduced(randomize(reference_vit()), SYSTEMS[name], [65, 40, 40])
    task = ReducedClassifier(network, 0.1, teacher=reference_vit()).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = task(torch.randn(2, 3, 64, 64), torch.tensor([0, 3]))
    sum(losses.values()).backward()
    missing = [name for name, parameter in task.named_parameters() if parameter.grad is None]
    assert not missing and all(parameter.grad.isfinite().all() for parameter in task.parameters())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert task.eval().predictions(torch.randn(2, 3, 64, 64))[-1].isfinite().all()


class ByQuery(Selector):
    def __init__(self, query):
        super().__init__()
        self.query = query

    def scores(self, x, context, num_prefix):
        return torch.ops.cropr.scores(x, self.query)


@pytest.mark.parametrize("llf", [False, True])
@pytest.mark.parametrize(
    "options", [{}, dict(reg_tokens=3), dict(rope=True, swiglu=True, global_pool="avg")]
)
def test_a_network_reduced_by_cropr_scores_is_cropr(options, llf):
    model = randomize(reference_vit(**options)).eval()
    pruned = cropr.apply(randomize(reference_vit(**options)), rate=9, llf=llf)
    model.load_state_dict(
        {k: v for k, v in pruned.state_dict().items() if not k.startswith("cropr.")}
    )
    queries = iter([module.query() for module in pruned.cropr])
    counts = pruned.cropr.config.counts(64 + model.num_prefix_tokens, 4, model.num_prefix_tokens)
    network = Reduced(model, lambda dim, kept, patches: ByQuery(next(queries)), counts, llf=llf)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network(images), pruned.eval()(images), rtol=1e-5, atol=1e-5)


def test_attention_is_the_softmax_inside_sdpa():
    q, k, v = (torch.randn(2, HEADS, 10, 4) for _ in range(3))
    sizes = torch.randint(1, 5, (2, 10)).float()
    plain, weighed = Context(), Context(sizes=sizes, log_sizes=sizes.log())
    torch.testing.assert_close(
        attention_of(q, k, plain) @ v, F.scaled_dot_product_attention(q, k, v)
    )
    bias = sizes.log()[:, None, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(attention_of(q, k, weighed) @ v, expected)


def test_patches_are_those_of_the_embedding():
    model, images = reference_vit(), torch.randn(2, 3, 64, 64)
    weight = model.patch_embed.proj.weight.flatten(1)
    expected = model.patch_embed(images).flatten(1, 2)
    torch.testing.assert_close(
        patches_of(images, 8) @ weight.T + model.patch_embed.proj.bias, expected
    )


def test_baselines_that_cannot_run_raise():
    with pytest.raises(ValueError, match="AttentionTopK needs a class token"):
        Reduced(
            reference_vit(class_token=False, global_pool="avg"), SYSTEMS["attention top-k"], COUNTS
        )
    with pytest.raises(ValueError, match="ToMe mixes tokens: they cannot come back"):
        Reduced(reference_vit(), SYSTEMS["ToMe"], [50, 40], llf=True)
    with pytest.raises(ValueError, match="EViT mixes tokens: they have no rotary positions"):
        Reduced(reference_vit(rope=True), SYSTEMS["EViT"], COUNTS)(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match="SiT is distilled, and there is no teacher"):
        ReducedClassifier(Reduced(reference_vit(), SYSTEMS["SiT"], [65, 31, 31]))
    with pytest.raises(
        ValueError, match="ToMe: 65 tokens, 1 of them prefix, can lose 32 at most, not 35"
    ):
        Reduced(reference_vit(), SYSTEMS["ToMe"], [30, 30, 30])(torch.randn(1, 3, 64, 64))
    with pytest.raises(TypeError, match="must be the reference ViT, got Linear"):
        Reduced(torch.nn.Linear(2, 2), SYSTEMS["SiT"], COUNTS)


def test_a_reducer_that_reads_undeclared_inputs_raises(monkeypatch):
    monkeypatch.setattr(EViT, "needs", frozenset())
    with pytest.raises(ValueError, match="looks at class_row, and does not declare it"):
        make("EViT")(torch.randn(1, 3, 64, 64))
