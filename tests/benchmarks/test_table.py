"""The table of systems: every system is measured on one set of weights."""

import sys

import pytest
import torch
from helpers.models import randomize, reference_vit

from benchmarks.baselines.network import Reduced
from benchmarks.baselines.registry import ROWS, SYSTEMS
from benchmarks.models import networks, table
from benchmarks.models.systems import architectures, systems
from benchmarks.models.timing import cell, check, measure


@pytest.mark.slow
def test_the_table_measures_every_system_on_one_set_of_weights():
    plain = (
        randomize(reference_vit(img_size=224, patch_size=16, embed_dim=32, depth=12))
        .eval()
        .requires_grad_(False)
    )
    with torch.inference_mode():
        models = systems(plain)
        rows = {
            row["system"]: row for row in cell(models, torch.randn(1, 3, 224, 224), 2, "eager", 1)
        }
        scorers = cell(architectures(plain), torch.randn(1, 3, 224, 224), 1, "eager", 1)
    names = {f"{system} | {schedule}" for system, schedule, _ in ROWS}
    assert set(rows) == names | {"unpruned", "plain"} and len(names) == len(ROWS)
    for name, row in rows.items():
        assert row["speed-up"] > 0 and row["peak MiB"] > 0
        assert name in ("unpruned", "plain") or row["GFLOPs"] < 0.75 * rows["unpruned"]["GFLOPs"]
    weights = {parameter.data_ptr() for parameter in plain.parameters()}
    for name, model in models.items():
        backbone = getattr(model, "backbone", model)
        assert {parameter.data_ptr() for parameter in backbone.parameters()} <= weights, name
    flops = {row["system"]: row["GFLOPs"] for row in scorers}
    assert flops["simple"] == flops["several heads, folded"] < flops["several heads, as published"]


@pytest.mark.slow
@pytest.mark.parametrize("script", [networks, table], ids=lambda script: script.__name__)
def test_a_run_without_minutes_prepares_every_cell_and_measures_none(
    script, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(
        sys, "argv", ["script", "--minutes", "-1", "--out", str(tmp_path / "out.json")]
    )
    script.main()
    assert capsys.readouterr().out == "out of minutes: start again to go on\n"
    assert not list(tmp_path.iterdir())


def test_the_error_of_a_failing_method_is_in_the_row_of_the_others():
    plain = randomize(reference_vit()).eval().requires_grad_(False)
    methods = {"unpruned": plain, "ToMe": Reduced(plain, SYSTEMS["ToMe"], [30, 30, 30])}
    row = measure(methods, torch.randn(1, 3, 64, 64), "eager", 1)
    assert row["unpruned / unpruned"] == 1 and row["ToMe: error"].startswith(
        "ToMe: 65 tokens, 1 of them prefix"
    )


def test_networks_are_checked_without_baselines():
    plain = reference_vit().eval().requires_grad_(False)
    images = torch.randn(1, 3, 64, 64)
    check({"unpruned": plain, "functional": plain}, images)
    with pytest.raises(RuntimeError, match="engine differs from functional by"):
        check({"unpruned": plain, "functional": plain, "engine": lambda x: 2 * plain(x)}, images)
