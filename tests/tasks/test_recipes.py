"""Each recipe, end to end."""

import pytest
from helpers.extras import require
from helpers.tasks import RECIPES

require("torchvision")

REACHES = {"segmentation": ("mIoU", 60), "detection": ("AP box 50", 8)}


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
