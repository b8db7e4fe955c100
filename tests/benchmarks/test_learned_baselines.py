"""Baselines that are learned, each against a slow, obvious version of its paper."""

import pytest
import torch
import torch.nn.functional as F
from helpers.baselines import DIM, TOKENS, context_of
from helpers.models import randomize, reference_vit

from benchmarks.baselines.learned import DynamicViT, PatchMerger, ReducedClassifier, Sinkhorn, SiT
from benchmarks.baselines.network import Context, Features, Reduced, Reduction
from benchmarks.baselines.registry import SYSTEMS


@pytest.mark.parametrize("cls", [SiT, Sinkhorn, PatchMerger])
def test_mixers_give_means_of_the_patches(cls):
    patches = TOKENS - 1
    reducer = cls(DIM, 5, patches) if cls is SiT else cls(DIM, 5)
    x = torch.randn(2, TOKENS, DIM)
    reduction = randomize(reducer)(x, context_of(x), 6, 1)
    assert reduction.weights.shape == (2, 5, patches) and (reduction.weights >= 0).all()
    torch.testing.assert_close(reduction.weights.sum(-1), torch.ones(2, 5))
    torch.testing.assert_close(reduction.tokens[:, 1:], reduction.weights @ x[:, 1:])


def test_sit_weighs_tokens_by_an_mlp_of_each():
    reducer, patches = randomize(SiT(DIM, 5, 9)), torch.randn(1, 9, DIM)
    logits = torch.stack([reducer.mlp(patch) * reducer.scale for patch in patches[0]])  # (9, 5)
    torch.testing.assert_close(reducer.log_weights(patches)[0].softmax(-1), logits.T.softmax(-1))


def test_patch_merger_weighs_normed_tokens_by_queries():
    reducer, patches = randomize(PatchMerger(DIM, 5)), torch.randn(2, 9, DIM)
    for b in range(2):
        logits = torch.stack([reducer.norm(patches[b]) @ query for query in reducer.queries])
        torch.testing.assert_close(reducer.log_weights(patches)[b], logits)


def test_sinkhorn_equals_the_textbook_algorithm():
    reducer, patches = Sinkhorn(DIM, 5, rounds=3), torch.randn(2, 9, DIM)
    weights = reducer.log_weights(patches).softmax(-1)
    for b in range(2):
        similarity = torch.stack(
            [
                torch.stack([F.cosine_similarity(c, p, dim=0) for p in patches[b]])
                for c in reducer.centres
            ]
        )
        transport = (similarity / 0.1).exp()
        for _ in range(3):
            transport = transport / transport.sum(1, keepdim=True)
            transport = transport / transport.sum(0, keepdim=True)
        torch.testing.assert_close(weights[b], transport / transport.sum(1, keepdim=True))
    many = Sinkhorn(DIM, 5, rounds=200).log_weights(patches).exp()
    torch.testing.assert_close(many.sum(2), torch.full((2, 5), 9 / 5), rtol=1e-3, atol=1e-3)


def test_dynamic_vit_masks_in_training_the_tokens_that_it_drops_in_eval(monkeypatch):
    model = randomize(reference_vit()).double()
    network = Reduced(model, DynamicViT, [65, 31, 31]).double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)

    def sure(decision, hard):  # keeps the 30 most probable tokens
        stays = torch.zeros_like(decision[..., 0]).scatter(
            1, decision[..., 0].topk(30).indices, 1.0
        )
        return torch.stack([stays, 1 - stays], -1)

    monkeypatch.setattr(F, "gumbel_softmax", sure)
    with torch.no_grad():
        masked = network.train()(images)
        torch.testing.assert_close(masked, network.eval()(images), rtol=1e-5, atol=1e-6)


def test_dynamic_vit_pays_for_a_share_that_is_not_the_target(monkeypatch):
    reducer = DynamicViT(DIM, 7, 21, stages=2).train()
    x = torch.randn(3, TOKENS, DIM)
    reduction = reducer(x, Context(), 8, 1)
    active = reduction.active[:, 1:]
    assert set(active.unique().tolist()) <= {0.0, 1.0} and (reduction.active[:, 0] == 1).all()
    expected = sum((row.mean() - 7 / 21) ** 2 for row in active) / 3 * 2.0 / 2
    torch.testing.assert_close(reduction.loss, expected)
    reduction.loss.backward()
    assert reducer.decide[0].weight.grad.abs().sum() > 0
    again = reducer(x, Context(active=reduction.active.detach()), 8, 1)
    assert (again.active <= reduction.active).all()


def test_dynamic_vit_distils_active_tokens():
    tokens, expected = torch.randn(2, 5, DIM), torch.randn(2, 5, DIM)
    active = torch.tensor([[1.0, 1, 0, 1, 0], [1, 0, 0, 0, 1]])
    loss = DynamicViT(DIM, 2, 4).token_loss(Features(tokens, [], active), expected, 1)
    pairs = [(0, 1), (0, 3), (1, 4)]
    torch.testing.assert_close(loss, sum(F.mse_loss(tokens[p], expected[p]) for p in pairs) / 3)


def test_a_network_equal_to_its_teacher_has_no_distillation_loss():
    torch.manual_seed(0)
    teacher = randomize(reference_vit()).eval()
    network = Reduced(reference_vit(), DynamicViT, [65, 31, 31])
    network.backbone.load_state_dict(teacher.state_dict())
    task = ReducedClassifier(network, teacher=teacher).train()
    network.reducers["1"].forward = lambda x, *rest: Reduction(x, active=torch.ones(x.shape[:2]))
    losses = task(torch.randn(2, 3, 64, 64), torch.tensor([0, 3]))
    assert losses["aux"].abs() < 1e-6 and losses["main"] > 0


def test_parameters_of_backbone_and_reducers_have_the_names_that_training_expects():
    from cropr_kernels.train import Config
    from cropr_kernels.train.optim import is_new, layer_of

    task = ReducedClassifier(
        Reduced(reference_vit(), SYSTEMS["SiT"], [65, 31, 31]), teacher=reference_vit()
    )
    names = [name for name, _ in task.named_parameters()]
    assert {layer_of(name, 4) for name in names if not is_new(name)} == set(range(6))
    assert {name.split(".")[0] for name in names if is_new(name)} == {"reducers"}
    assert set(task.state_dict()) == set(names) and Config().layer_decay is not None
