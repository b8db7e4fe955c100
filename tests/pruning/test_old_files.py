"""Files written before values had their present names load with the same meaning."""

import json

import pytest
import torch
from helpers.models import randomize, reference_vit

import cropr_kernels as cropr
from cropr_kernels.pruning.saving import apply_options
from cropr_kernels.train import Config

RESTORES = {"left": "as_pruned", "host": "track_parent"}


@pytest.mark.parametrize(("written", "restore"), RESTORES.items())
@pytest.mark.parametrize("form", ["fields", "word"])
def test_options_of_earlier_models_load_with_the_same_fusion(written, restore, form):
    llf = {"restore": written, "blocks": 1} if form == "fields" else written
    model = apply_options(reference_vit(), {"rate": 8, "llf": llf, "num_outputs": 0})
    assert model.cropr.config.llf == cropr.Fusion(restore)


@pytest.mark.parametrize(("written", "restore"), RESTORES.items())
def test_earlier_queries_load_with_the_same_fusion(written, restore, tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    model = cropr.apply(randomize(reference_vit()), rate=8, llf=True, num_outputs=0).eval()
    cropr.save_queries(
        model, tmp_path / "queries.safetensors", {"llf": {"restore": written, "blocks": 1}}
    )
    loaded = cropr.load_queries(
        cropr.apply(reference_vit(), rate=8, llf=True), tmp_path / "queries.safetensors"
    )
    assert loaded.cropr.config.llf == cropr.Fusion(restore)


@pytest.mark.parametrize(("written", "restore"), RESTORES.items())
def test_the_configuration_of_an_earlier_run_loads(written, restore, tmp_path):
    values = json.loads(Config(llf=True).to_json()) | {"restore": written}
    assert Config.parse(json.dumps(values), tmp_path / "config.json").restore == restore


def test_llf_true_loads_as_as_pruned():
    model = apply_options(reference_vit(), {"rate": 8, "llf": True, "num_outputs": 0})
    assert model.cropr.config.llf == cropr.Fusion("as_pruned")
    assert model(torch.randn(1, 3, 64, 64)) is not None
