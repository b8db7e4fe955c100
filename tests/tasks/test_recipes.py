"""Each recipe, end to end."""

import sys

import pytest
from helpers.extras import require
from helpers.tasks import RECIPES, write_scenes

require("torchvision")

REACHES = {"segmentation": ("mIoU", 60), "detection": ("AP box 50", 8)}
# One block prunes, or none
SHORT = {
    "segmentation": ("segmentation", dict(rate=3, llf=True)),
    "detection": ("detection", dict(rate=3, llf=True, global_blocks=(1,))),
    "segmentation, unpruned": ("segmentation", {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SHORT)
def test_a_run_is_measured_and_drawn_and_commands_for_classifiers_refuse_it(
    case, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("torchmetrics", reason="needs the train extra")
    from cropr_kernels.cli import __main__ as cli
    from cropr_kernels.train import Config, train

    name, options = SHORT[case]
    scenes = write_scenes(tmp_path / "scenes", 2)
    config = Config(
        data=str(scenes), model_options=("depth=3", "embed_dim=48", "num_heads=2"), patch_size=8,
        batch_size=2, workers=0, device="cpu", **{**RECIPES[name], "epochs": 1, **options},
    )  # fmt: skip
    out = tmp_path / "run"
    train(config, out, show=False)
    run = str(out)
    assert cli.main(["eval", run, "--quiet", "--pictures", "2"]) == 0
    printed = capsys.readouterr().out
    pruned = bool(options)
    assert REACHES[name][0] in printed and ("no pruning" in printed) != pruned
    assert (out / "maps.png").exists() == pruned and (out / "curves.png").exists()
    results = ["--out", str(tmp_path / "results")]
    refusals = [(["infer", run, str(scenes), *results], f"a run of classification, got {name}")]
    if not pruned:
        refusals.append((["eval", run, "--rates", "2"], "--rates needs a pruned model"))
    for command, message in refusals:
        assert cli.main(command) == 1 and message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["eval", run, "--quiet"]) == 0
    assert "no picture: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_learns_and_its_commands_measure_and_draw(name, scenes, tmp_path, capsys):
    pytest.importorskip("torchmetrics", reason="needs the train extra")
    from cropr_kernels.cli import __main__ as cli
    from cropr_kernels.train import Config, train

    config = Config(
        data=str(scenes), model_options=("depth=5", "embed_dim=64", "num_heads=2"), patch_size=8,
        rate=3, llf=True,
        batch_size=4, workers=0, device="cpu", eval_epochs=100, **RECIPES[name],
    )  # fmt: skip
    reached = train(config, tmp_path, show=False)
    metric, least = REACHES[name]
    assert reached[metric] > least, reached
    assert cli.main(["eval", str(tmp_path), "--quiet", "--pictures", "2"]) == 0
    assert metric in capsys.readouterr().out
    assert (tmp_path / "maps.png").exists() and (tmp_path / "curves.png").exists()
