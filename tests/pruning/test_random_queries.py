"""Random queries that would decide what is pruned raise one warning; other queries raise none."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers.models import reference_vit, timm_vit

import cropr_kernels as cropr
from cropr_kernels.pruning.deployment import deployed_copy

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
WARNING = "the queries are random, so what is pruned is arbitrary; call cropr.calibrate"


def like(model):
    return IMAGES.to(next(model.parameters()).dtype)


CALLS = {
    "deploy": cropr.deploy,
    "pruning_map": lambda model: cropr.pruning_map(model, like(model)),
    "merge_map": lambda model: cropr.merge_map(model, like(model)),
    "agreement": lambda model: cropr.agreement(model, like(model), [2]),
}


def pruned(**options):
    return cropr.apply(reference_vit(), **{"rate": 8, "merge": True, **options}).eval()


def is_quiet(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return not any(WARNING in str(warning.message) for warning in caught)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_random_queries_warn_once_at_the_line_of_the_caller(name, half):
    model = pruned()
    if half:
        model = copy.deepcopy(pickle.loads(pickle.dumps(model))).bfloat16()
    with pytest.warns(UserWarning, match=rf"cropr.{name}: {WARNING}") as caught:
        CALLS[name](model)
    assert [warning.filename for warning in caught] == [__file__]
    assert is_quiet(lambda: CALLS[name](model)) and is_quiet(
        lambda: cropr.pruning_map(cropr.deploy(model), like(model))
    )


def test_an_exported_file_of_random_queries_warns(tmp_path):
    with pytest.warns(UserWarning, match=f"cropr.export: {WARNING}"):
        cropr.export(pruned(merge=False), IMAGES, tmp_path / "model.pt2", format="torch")


def test_a_deployed_model_warns_when_it_begins_to_prune():
    model = pruned(rate=0)
    assert is_quiet(lambda: cropr.deploy(model))
    with pytest.warns(UserWarning, match=f"cropr.set_rate: {WARNING}"):
        cropr.set_rate(cropr.deploy(model), 3)
    assert is_quiet(lambda: cropr.set_rate(model, 3)), "it may still be calibrated"
    assert is_quiet(lambda: cropr.set_rate(deployed_copy(model), 3)), (
        "measuring time needs no queries"
    )


def trained(model, tmp_path):
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3)
    cropr.loss(lambda output, _: output.square().sum(), *model(IMAGES), None).backward()
    optimizer.step()


def loaded(model, tmp_path):
    model.load_state_dict(pruned(num_queries=len(model.cropr[0].queries)).state_dict())


def assigned(model, tmp_path):
    model.load_state_dict(pruned(num_queries=len(model.cropr[0].queries)).state_dict(), assign=True)


def with_a_file(model, tmp_path):
    cropr.save_queries(pruned(), tmp_path / "queries.safetensors")
    cropr.load_queries(model, tmp_path / "queries.safetensors")


def calibrated(model, tmp_path):
    cropr.calibrate(model, IMAGES)


@pytest.mark.parametrize(
    ("make", "num_queries", "deployed"),
    [
        (trained, 3, False),
        (loaded, 1, False),
        (assigned, 3, False),
        (with_a_file, 1, False),
        (with_a_file, 3, True),
        (calibrated, 3, False),
        (calibrated, 1, True),
    ],
)
def test_trained_loaded_and_calibrated_queries_do_not_warn(make, num_queries, deployed, tmp_path):
    model = pruned(num_queries=num_queries)
    model = deployed_copy(model) if deployed else model
    model.cropr.warned = False
    make(model, tmp_path)
    for other in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        for call in CALLS.values():
            assert is_quiet(lambda call=call, other=other: call(other))
    assert not any("initial" in name for name in model.state_dict())


def test_custom_modules_do_not_warn():
    class Mine(cropr.Scorer):
        def query(self):
            return torch.ones(64)

    model = cropr.apply(timm_vit(), rate=8, make_module=lambda layer, block: Mine())
    assert is_quiet(lambda: cropr.deploy(model))


def test_weights_on_the_meta_device_do_not_warn():
    with torch.device("meta"):
        model = cropr.apply(reference_vit(), rate=8)
    assert is_quiet(lambda: cropr.deploy(model))
