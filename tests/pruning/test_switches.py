"""The paper's switches: each does what it says, and what cannot work together is refused."""

import pytest
import torch
import torch.nn.functional as F
from helpers.models import reference_vit

import cropr_kernels as cropr
from cropr_kernels.pruning.module import Cropr

X = dict(size=(2, 17, 24))


def test_several_heads_fold_into_one_vector():
    module = Cropr(24, 5, num_queries=3, num_heads=4).double()
    x = torch.randn(**X).double()
    attention = module.aggregator.attention
    q = attention.q_proj(module.queries).unflatten(-1, (4, 6))
    k = attention.k_proj(x).unflatten(-1, (4, 6))
    logits = torch.einsum("mhc,bnhc->bhmn", q, k)
    torch.testing.assert_close((x @ module.query().double()), logits.sum((1, 2)), rtol=1e-5, atol=1e-5)
    out = torch.einsum("bhmn,bnhc->bmhc", (logits / 6**0.5).softmax(-1), attention.v_proj(x).unflatten(-1, (4, 6)))
    out = attention.proj(out.flatten(2))
    expected = module.aggregator.head(
        module.aggregator.norm2(out + module.aggregator.mlp(module.aggregator.norm1(out)))
    )
    prediction, scores = module.predict(x)
    torch.testing.assert_close(prediction, expected)
    torch.testing.assert_close(scores, torch.ops.cropr.scores(x, module.query()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_heads", [None, 2])
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_the_auxiliary_loss_reaches_the_backbone_only_without_stop_gradient(num_heads, stop_gradient):
    model = reference_vit().train()
    cropr.apply(model, rate=8, num_heads=num_heads, stop_gradient=stop_gradient)
    _, aux = model(torch.randn(2, 3, 64, 64))
    sum(prediction.square().sum() for prediction in aux).backward()
    reached = [p.grad is not None and bool(p.grad.any()) for p in model.blocks[0].parameters()]
    assert not any(reached) if stop_gradient else all(reached)
    assert all(p.grad is not None for p in model.cropr.parameters())


@pytest.mark.parametrize("num_queries", [1, 3])
def test_without_stop_gradient_predictions_are_the_same(num_queries):
    modules = [Cropr(24, 5, num_queries, stop_gradient=stop) for stop in (True, False)]
    modules[1].load_state_dict(modules[0].state_dict())
    x = torch.randn(**X)
    (plain, scores), (open_, open_scores) = (module.predict(x) for module in modules)
    torch.testing.assert_close(open_, plain)
    torch.testing.assert_close(open_scores, scores)


def test_no_mlp_leaves_norm_and_head():
    module = Cropr(24, 5, mlp_ratio=0)
    assert {name.split(".")[1] for name in module.state_dict() if name.startswith("aggregator")} == {"norm2", "head"}
    x = torch.randn(**X)
    out = F.softmax(module.queries @ x.mT / 24**0.5, -1) @ x
    expected = module.aggregator.head(module.aggregator.norm2(out)).squeeze(1)
    torch.testing.assert_close(module.predict(x)[0], expected)


@pytest.mark.parametrize("num_outputs", [0, 5])
def test_sampling_draws_in_proportion_in_training_and_takes_the_best_in_eval(num_outputs):
    module = Cropr(4, num_outputs, sampling=True)
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


def test_progress_prunes_a_share_and_the_rate_rises_in_whole_tokens():
    model = cropr.apply(reference_vit(), rate=10)
    plan = lambda: model.cropr.schedule(65, 4, 1, False)  # noqa: E731
    assert plan() == [54, 44, 34]
    assert cropr.set_progress(model, 0.0) is model and plan() == [65, 65, 65]
    cropr.set_progress(model, 0.5)
    assert plan() == cropr.schedule.rate(65, 4, 5)
    assert cropr.set_progress(model, 1.0) and plan() == [54, 44, 34]
    half = cropr.schedule.resolve(const=(2, 25)).at(0.5)
    assert half(65, 4, 1, False) == [65, 45, 45]
    assert "const=(2, 25), 50% of it" in str(half)


def test_one_reduction_keeps_its_count():
    assert cropr.schedule.const(197, 12, (4, 99)) == [197] * 3 + [99] * 8
    model = cropr.apply(reference_vit(), const=(1, 33))
    assert cropr.pruning_map(model, torch.randn(1, 3, 64, 64)).flatten().bincount().tolist() == [0, 32, 0, 0, 32]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Cropr(24, 5, num_heads=5), "num_heads must divide dim=24"),
        (lambda: Cropr(24, 0, num_heads=4), "num_outputs be >= 1 so that its projections learn"),
        (lambda: Cropr(24, 5, mlp_ratio=-1), "mlp_ratio >= 0"),
        (lambda: cropr.schedule.const(197, 12, (12, 99)), r"after in \[1, 11\] for 12 blocks"),
        (lambda: cropr.schedule.const(197, 12, (4,)), r"const must be \(after, count\)"),
        (lambda: cropr.schedule.resolve(rate=8).at(1.5), r"share must be in \[0, 1\], got 1.5"),
        (lambda: cropr.set_progress(reference_vit(), 0.5), "cropr.set_progress: the model is not pruned"),
    ],
)
def test_what_cannot_work_is_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
