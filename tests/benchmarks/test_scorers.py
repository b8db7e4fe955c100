"""The paper's ablations of the scorer: the effect of each, and pruning and deployment as for
Cropr."""

import pytest
import torch
from helpers.models import randomize, reference_vit

import cropr_kernels as cropr
from benchmarks.accuracy.cells import CELLS
from benchmarks.baselines.modules import replace_modules
from benchmarks.baselines.scorers import (
    SCORERS,
    MultiHeadCropr,
    NonSalientCropr,
    OpenCropr,
    SamplingCropr,
)
from cropr_kernels.tasks import Classifier

X = dict(size=(2, 17, 24))
MAKE = {
    "Cropr": cropr.Cropr,
    **SCORERS,
    "several heads": lambda dim, outputs, **options: MultiHeadCropr(
        dim, outputs, num_heads=4, **options
    ),
}


def pruned(name, **options):
    return cropr.apply(
        randomize(reference_vit()),
        rate=8,
        make_module=lambda layer, block: randomize(MAKE[name](64, 5)),
        **options,
    )


def test_several_heads_fold_into_one_vector():
    module = MultiHeadCropr(24, 5, num_queries=3, num_heads=4).double()
    x = torch.randn(**X).double()
    attention = module.aggregator.attention
    q = attention.q_proj(module.queries).unflatten(-1, (4, 6))
    k = attention.k_proj(x).unflatten(-1, (4, 6))
    logits = torch.einsum("mhc,bnhc->bhmn", q, k)
    torch.testing.assert_close(
        (x @ module.query().double()), logits.sum((1, 2)), rtol=1e-5, atol=1e-5
    )
    out = torch.einsum(
        "bhmn,bnhc->bmhc", (logits / 6**0.5).softmax(-1), attention.v_proj(x).unflatten(-1, (4, 6))
    )
    out = attention.proj(out.flatten(2))
    expected = module.aggregator.head(
        module.aggregator.norm2(out + module.aggregator.mlp(module.aggregator.norm1(out)))
    )
    prediction, scores = module.predict(x)
    torch.testing.assert_close(prediction, expected)
    torch.testing.assert_close(
        scores, torch.ops.cropr.scores(x, module.query()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", MAKE)
def test_the_auxiliary_loss_reaches_the_backbone_only_without_stop_gradient(name):
    model = pruned(name).train()
    _, aux = model(torch.randn(2, 3, 64, 64))
    sum(prediction.square().sum() for prediction in aux).backward()
    reached = [p.grad is not None and bool(p.grad.any()) for p in model.blocks[0].parameters()]
    assert all(reached) if name == "no stop-gradient" else not any(reached)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.cropr.parameters())


@pytest.mark.parametrize("num_queries", [1, 3])
def test_without_stop_gradient_predictions_are_the_same(num_queries):
    plain, open_ = cropr.Cropr(24, 5, num_queries), OpenCropr(24, 5, num_queries)
    open_.load_state_dict(plain.state_dict())
    x, absent = torch.randn(**X), torch.zeros(2, 17)
    absent[:, 12:] = -torch.inf
    for log_sizes in (None, absent):
        torch.testing.assert_close(open_.predict(x, log_sizes), plain.predict(x, log_sizes))


@pytest.mark.parametrize("num_outputs", [0, 5])
def test_sampling_draws_in_proportion_in_training_and_takes_the_best_in_eval(num_outputs):
    module = SamplingCropr(4, num_outputs)
    with torch.no_grad():
        module.queries.copy_(torch.tensor([[2.0, 0, 0, 0]]))
    x = torch.zeros(1, 4, 4)
    x[0, :, 0] = torch.tensor([0.0, 1.0, 2.0, 3.0])  # mean logits / sqrt(D): 0, 1, 2, 3
    batch = x.expand(20000, -1, -1)
    _, scores = module.train().predict(batch)
    first = module(batch, 1, 0, scores).kept_idx.flatten().bincount(minlength=4) / 20000
    torch.testing.assert_close(first, torch.arange(4.0).softmax(0), rtol=0, atol=0.02)
    _, scores = module.eval().predict(x)
    assert module(x, 1, 0, scores).kept_idx.item() == 3


def test_non_salient_keeps_what_cropr_drops_with_and_without_the_auxiliary_head():
    model = cropr.apply(randomize(reference_vit()), rate=9)
    module, x = model.cropr[0], torch.randn(2, 65, model.embed_dim)
    dropped = module(x, 56, 1).pruned_idx
    module.__class__ = NonSalientCropr
    assert torch.equal(module(x, 10, 1).kept_idx[:, 1:].sort(1).values, dropped.sort(1).values)
    _, scores = module.train().predict(x)
    assert torch.equal(
        module(x, 10, 1, scores).kept_idx[:, 1:].sort(1).values, dropped.sort(1).values
    )
    losses = Classifier(model)(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))
    assert losses["aux"].isfinite()


def test_non_salient_pruning_is_the_complement_of_cropr():
    x = torch.randn(2, 10, 8)
    module = cropr.Cropr(8, 3)
    plain = module(x, 5).kept_idx
    expected, _ = module.predict(x)
    module.__class__ = NonSalientCropr
    prediction, scores = module.predict(x)
    for split in (module(x, 5), module(x, 5, 0, scores)):
        assert torch.equal(split.pruned_idx, plain)
    assert torch.equal(prediction, expected)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("options", [{}, {"llf": True}, {"merge": True}], ids=str)
@torch.no_grad()
def test_a_deployed_model_folds_scorers_and_gives_the_same_logits(name, options):
    model, images = pruned(name, **options).eval(), torch.randn(2, 3, 64, 64)
    deployed = cropr.deploy(model)
    assert deployed.cropr.engine is not None
    for light, module in zip(deployed.cropr, model.cropr):
        assert sum(parameter.numel() for parameter in light.parameters()) == 0
        assert torch.equal(light.query(), module.query())
    torch.testing.assert_close(deployed(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["non-salient", "no stop-gradient", "sampling"])
def test_calibration_sets_the_queries_of_scorers_like_those_of_cropr(name):
    model, images = cropr.apply(randomize(reference_vit()), rate=8), torch.randn(4, 3, 64, 64)
    expected = [module.query() for module in cropr.calibrate(model, images).cropr]
    replace_modules(model, lambda module, block: SCORERS[name](64, 5))
    for module, query in zip(cropr.calibrate(model, images).cropr, expected):
        assert torch.equal(module.query(), -query if name == "non-salient" else query)


def test_every_scorer_is_trained_in_a_cell():
    trained = {name.removeprefix("random start, ") for cells in CELLS.values() for name in cells}
    assert set(SCORERS) <= trained


@pytest.mark.parametrize(("num_outputs", "num_heads"), [(5, 5), (0, 4), (5, 0)])
def test_illegal_numbers_of_heads_raise(num_outputs, num_heads):
    with pytest.raises(
        ValueError,
        match="num_heads must divide dim=24, and num_outputs be >= 1 so that its projections",
    ):
        MultiHeadCropr(24, num_outputs, num_heads=num_heads)
