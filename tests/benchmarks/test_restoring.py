"""Methods that restore pruned tokens: against examples worked by hand, and networks of the
package."""

import copy

import pytest
import torch
from helpers.models import randomize, reference_vit

import cropr_kernels as cropr
from benchmarks.accuracy.restoring import METHODS, SCALED, flop_ratio
from benchmarks.baselines.restores import (
    TEMPERATURE,
    Departure,
    Trunk,
    as_pruned,
    change_scaled,
    channel_factors,
    entering,
    parent_changed,
    parent_copied,
    parent_rechosen,
    parents,
    roots,
    run_fusion,
    run_trunk,
    run_without_fusion,
)

MERGES = {"drop": None, "merge": cropr.Merge()}
IMAGES = dict(size=(3, 3, 64, 64))
TOKENS, DEPTH = 65, 6
RESTORES = {name: method for name, method in METHODS.items() if method.restore is not None}


def tiny():
    torch.manual_seed(0)
    return randomize(reference_vit(depth=DEPTH)).eval()


def pruned_case(rate, merge):
    """Return a model, its pruned twin without LLF, images, and the departures of their tokens."""
    model, images = tiny(), torch.randn(**IMAGES)
    twin = cropr.apply(copy.deepcopy(model), rate=rate, merge=merge or False, num_outputs=0)
    counts = cropr.Schedule(rate=rate).counts(TOKENS, DEPTH)
    departures = run_trunk(model, [module.query() for module in twin.cropr], images, counts, merge)
    return model, twin, images, departures


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
@torch.no_grad()
def test_at_rate_0_every_method_is_the_unpruned_model(merge):
    model, _, images, departures = pruned_case(0, merge)
    expected = model.forward_features(images)
    torch.testing.assert_close(run_without_fusion(model, departures), expected, rtol=0, atol=1e-5)
    for name, method in (RESTORES | {SCALED: None}).items():
        if method is None:
            trunk = entering(model, departures, 1)
            got = run_fusion(model, change_scaled(trunk, channel_factors([trunk], [trunk.x])))
        else:
            got = run_fusion(
                model, method.restore(entering(model, departures, method.blocks)), method.blocks
            )
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5, msg=name)
    assert flop_ratio([TOKENS] * (DEPTH - 1), TOKENS, 64, 1) == 1


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
@torch.no_grad()
def test_the_trunk_prunes_like_the_package(merge):
    model, twin, images, departures = pruned_case(9, merge)
    for llf, restore in (
        ("as_pruned", as_pruned),
        ("track_parent", parent_changed),
        (cropr.Fusion("track_parent", 2), parent_changed),
        (cropr.Fusion(blocks=0), parent_changed),
    ):
        fused = cropr.apply(
            copy.deepcopy(model), rate=9, merge=merge or False, llf=llf, num_outputs=0
        )
        for module, other in zip(fused.cropr, twin.cropr):
            module.load_state_dict(other.state_dict())
        blocks = fused.cropr.config.full_blocks
        got = run_fusion(model, restore(entering(model, departures, blocks)), blocks)
        torch.testing.assert_close(model.forward_head(got), fused(images), rtol=0, atol=1e-4)
    got = run_without_fusion(model, departures)
    torch.testing.assert_close(model.forward_head(got), twin(images), rtol=0, atol=1e-4)
    if merge is not None:
        torch.testing.assert_close(got, twin.forward_features(images), rtol=0, atol=1e-4)
        assert not roots(departures)[:, 0].any(), "nothing merges into the class token"


def by_hand(target=False):
    """Return five tokens in a plane, the first a class token: 4 is pruned, its parent is 3; then 3,
    its parent is 1."""
    first = torch.tensor([[[9.0, 9], [1, 0], [0, 1], [3, 3], [2, 2.2]]])
    second = torch.tensor([[[9.0, 9], [4, 2], [0, 5], [5, 4], [2, 2.2]]])
    x = torch.tensor([[[9.0, 9], [6, 2.5], [1, 9], [5, 4], [2, 2.2]]])
    idx = [torch.tensor([[4]]), torch.tensor([[3]])]
    kept = [torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 1, 2]])]
    keys = torch.tensor([[[0.0, 1], [1, 0], [0, 1], [1, 0.1], [0, 1]]])
    merged = first.clone(), second.clone()
    if target:  # a target moves to the middle of both
        merged[0][0, 3], merged[1][0, 1] = (
            (first[0, 3] + first[0, 4]) / 2,
            (second[0, 1] + second[0, 3]) / 2,
        )
    targets = [torch.tensor([[3]]), torch.tensor([[1]])] if target else [None, None]
    departures = [
        Departure(*fields)
        for fields in zip(idx, kept, (first, second), merged, (keys, keys), targets)
    ]
    return Trunk(x, departures, 1)


def restored(x, **rows):
    """Return x with rows n3 and n4 in place of those of tokens 3 and 4."""
    x = x.clone()
    x[0, 3], x[0, 4] = (torch.tensor(rows[name]) for name in ("n3", "n4"))
    return x


def test_a_parent_pruned_later_passes_on_the_change_of_its_own_parent():
    trunk = by_hand()
    # 3: (5, 4) + (6, 2.5) - (4, 2); 4: (2, 2.2) + that - (3, 3)
    torch.testing.assert_close(parent_changed(trunk), restored(trunk.x, n3=[7, 4.5], n4=[6, 3.7]))
    torch.testing.assert_close(parent_copied(trunk), restored(trunk.x, n3=[6, 2.5], n4=[6, 2.5]))
    assert as_pruned(trunk) is trunk.x
    # by keys 4 is most like 2: (2, 2.2) + (1, 9) - (0, 1); 3 is most like 1 as before
    torch.testing.assert_close(
        parent_changed(trunk, keys=True), restored(trunk.x, n3=[7, 4.5], n4=[3, 10.2])
    )


def test_the_parent_of_a_merged_token_is_its_target_after_merging():
    trunk = by_hand(target=True)
    # 3: (5, 4) + (6, 2.5) - (4.5, 3); 4: (2, 2.2) + that - (2.5, 2.6)
    torch.testing.assert_close(parent_changed(trunk), restored(trunk.x, n3=[6.5, 3.5], n4=[6, 3.1]))


def test_several_parents_are_weighed_by_their_cosine():
    trunk = by_hand()
    parent_idx, weights = parents(trunk.departures[0], 1, 2)
    assert parent_idx.tolist() == [[[3, 2]]]
    token = torch.tensor([2, 2.2])
    cosine = [
        torch.cosine_similarity(token, trunk.departures[0].before[0, n], dim=0) for n in (3, 2)
    ]
    torch.testing.assert_close(weights[0, 0], (torch.stack(cosine) / TEMPERATURE).softmax(0))
    parent_idx, weights = parents(trunk.departures[1], 1, 4)
    assert sorted(parent_idx[0, 0].tolist()) == [1, 2], "no more parents than active patches"
    assert weights.sum().item() == pytest.approx(1)
    into = trunk.departures[0]._replace(target=torch.tensor([[1]]))
    assert parents(into, 1, 2)[0].tolist() == [[[1, 3]]], "the target comes first"


def test_parents_are_chosen_again_among_active_tokens():
    trunk = by_hand()
    # 4 follows 3 to (2, 2.2) + (5, 4) - (3, 3) = (4, 3.2), then is most like 1: + (6, 2.5) - (4,
    # 2). 3 as before.
    torch.testing.assert_close(parent_rechosen(trunk), restored(trunk.x, n3=[7, 4.5], n4=[6, 3.7]))
    # 3 turns to the side of 2, and 4 with it: (1.5, 5.2)
    trunk.departures[1].before[0, 3] = torch.tensor([2.5, 6])
    x = put_left(trunk, [2.5, 6])
    expected = restored(x, n3=[3.5, 10], n4=[2.5, 9.2])
    torch.testing.assert_close(parent_rechosen(trunk._replace(x=x)), expected)
    torch.testing.assert_close(parent_rechosen(trunk._replace(x=x), 1), expected)


def put_left(trunk, row):
    x = trunk.x.clone()
    x[0, 3] = torch.tensor(row)
    return x


def test_channel_factors_are_recovered():
    trunk, factors = by_hand(), torch.tensor([0.5, 2.0])
    expected = change_scaled(trunk, factors)
    torch.testing.assert_close(channel_factors([trunk, trunk], [expected, expected]), factors)
    assert torch.equal(expected[0, :3], trunk.x[0, :3])


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
@torch.no_grad()
def test_only_pruned_tokens_are_restored(merge):
    model, _, _, departures = pruned_case(9, merge)
    for name, method in RESTORES.items():
        trunk = entering(model, departures, method.blocks)
        got, kept_idx = method.restore(trunk), trunk.departures[-1].kept_idx
        assert torch.equal(
            torch.ops.cropr.gather(got, kept_idx), torch.ops.cropr.gather(trunk.x, kept_idx)
        ), name
        assert got.isfinite().all()
