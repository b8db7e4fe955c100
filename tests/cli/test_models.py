"""Every command takes every kind of model: weight files, timm, torchvision, transformers, runs of `cropr train`."""

import argparse
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.folders import FOLDERS

import cropr_kernels as cropr
from cropr_kernels.cli import __main__ as cli

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"
pytestmark = pytest.mark.filterwarnings("ignore")  # exporters warn of their own deprecations


@pytest.fixture
def run(capsys):
    """Runs a command and returns what it printed."""

    def command(*arguments):
        status = cli.main([*map(str, arguments)])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out

    return command


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_command_takes(kind, run, tmp_path):
    for library in ("PIL", "matplotlib", "tqdm"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    tables = pytest.importorskip("pyarrow.dataset", reason="pyarrow is not installed")
    name, classifies = FOLDERS[kind](tmp_path), "features" not in kind and "tower" not in kind
    queries, schedule = tmp_path / "queries.safetensors", tmp_path / "schedule.json"
    assert "kept after each block" in run("info", name, "--rate", "4")
    out = run("calibrate", name, PHOTOS, "--rates", "4", "--least", "0", "--photos", "2", "--out", queries, "--quiet")
    assert ("same class, %" if classifies else "cosine, %") in out and "recommended: rate 4" in out
    assert (out.splitlines()[2].split()[-1] == "-") != classifies
    out = run("map", name, PHOTOS / "coffee.jpg", "--queries", queries, "--rate", "4", "--out", tmp_path / "maps")
    assert re.search(r"\d+ of \d+ patches are kept", out) and "calibrated" not in out
    run("tune", name, "--speedup", "1", "--rounds", "1", "--out", schedule, "--quiet")
    assert json.loads(schedule.read_text())["keep"]
    out = run("bench", name, "--rates", "4", "--batch", "1", "--rounds", "1", "--out", tmp_path / "bench", "--quiet")
    assert "FLOP ratio" in out
    export = ["export", name, "--queries", queries, "--rate", "4", "--rounds", "1", "--images", PHOTOS]
    out = run(*export, "--format", "torch", "--out", tmp_path / "files")
    stem = Path(name).stem
    assert (tmp_path / "files" / f"{stem}.pt2").is_file() and f"{stem}.pt2" in out
    shutil.copytree(PHOTOS, tmp_path / "photos", ignore=shutil.ignore_patterns("*a*.jpg"))
    infer = ["infer", name, tmp_path / "photos", "--queries", queries, "--rate", "4", "--quiet", "--out"]
    for more in [[], ["--features"]]:
        folder = tmp_path / f"results{len(more)}"
        assert "3 photos, 0 of them unreadable" in run(*infer, folder, *more)
        rows = tables.dataset(folder, format="parquet").to_table().to_pylist()
        assert len(rows) == 3 and ("classes" in rows[0]) == (classifies and not more)


def test_a_model_of_torchvision_by_name(run):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    out = run("info", "vit_b_32", "--rate", "1")
    assert "torchvision.models.vision_transformer.VisionTransformer" in out and "50 of width 768" in out


def test_the_pixels_of_a_model_are_its_own_unless_given(tmp_path):
    from cropr_kernels.cli.common import load_with_queries

    name = FOLDERS["transformers classifier"](tmp_path)
    options = dict(model=name, queries=None, rate=0, keep=None, llf=False, merge=False, mean=None, std=None)
    own = load_with_queries(argparse.Namespace(**options)).pixels
    given = load_with_queries(argparse.Namespace(**options | {"mean": [0.0] * 3})).pixels
    assert own.mean == (0.1, 0.2, 0.3) and tuple(given.mean) == (0.0,) * 3 and given.std == own.std
    images = torch.tensor([0.5, 0.7, 0.9]).view(3, 1, 1).expand(3, 2, 2)
    torch.testing.assert_close(own.normalise(images), torch.ones(3, 2, 2))


def test_counts_must_be_positive_in_every_command(tmp_path, capsys):
    for arguments, name in (
        (["tune", "x", "--speedup", "2", "--rounds", "0"], "rounds"),
        (["bench", "x", "--batch", "4", "0"], "batch"),
        (["calibrate", "x", str(tmp_path), "--held-out", "0"], "held-out"),
        (["infer", "x", str(tmp_path), "--out", "y", "--workers", "-1"], "workers"),
    ):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert f"argument --{name}: must be >= 1, got " in capsys.readouterr().err


def test_the_version_names_what_results_depend_on(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    own = f"cropr_kernels {cropr.__version__}, torch {torch.__version__}, triton "
    printed = capsys.readouterr().out
    assert printed.startswith(own) and ", device " in printed and printed.count("\n") == 1
