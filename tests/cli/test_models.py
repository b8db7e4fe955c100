"""Every command takes models of every source: weight files, timm, torchvision, transformers, `cropr
train`."""

import argparse
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.folders import FOLDERS
from helpers.models import randomize, reference_vit

import cropr_kernels as cropr
from cropr_kernels.cli import __main__ as cli
from cropr_kernels.models.factory import create_model

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"
pytestmark = pytest.mark.filterwarnings("ignore")  # exporters warn of their own deprecations


@pytest.fixture
def run(capsys):
    """Return a function that runs a command and returns its output."""

    def command(*arguments):
        status = cli.main([*map(str, arguments)])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out

    return command


def saved(folder):
    cropr.save(
        cropr.apply(randomize(reference_vit()), rate=3, merge=True, num_outputs=0), folder / "saved"
    )
    return [folder / "saved"]


def checkpoint_of_timm(folder):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("test_vit", img_size=96, num_classes=5)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save(
        {"epoch": 3, "state_dict": state, "args": argparse.Namespace(lr=0.1)},
        folder / "best.pth.tar",
    )
    return [
        folder / "best.pth.tar",
        "--arch",
        "test_vit",
        "--img-size",
        "96",
        "--num-classes",
        "5",
    ]


SOURCES = {name: lambda folder, make=make: [make(folder)] for name, make in FOLDERS.items()}
SOURCES |= {"saved by cropr.save": saved, "checkpoint of timm, --arch": checkpoint_of_timm}


@dataclass(frozen=True)
class Source:
    """A model as commands take it, calibrated."""

    name: str
    words: list[str]  # its name and options
    queries: Path
    rate: str
    calibrated: str  # the output of `cropr calibrate`

    @property
    def classifies(self) -> bool:
        return "features" not in self.name and "tower" not in self.name

    @property
    def pruned(self) -> list[str]:
        """Arguments of a command that prunes; the rate is that of the queries."""
        return [*self.words, "--queries", str(self.queries), "--quiet"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Return a function that writes and calibrates the model of each source once."""
    calibrated = {}

    def get(name, run):
        if name not in calibrated:
            folder = tmp_path_factory.mktemp("source")
            words = [*map(str, SOURCES[name](folder))]
            queries, rate = folder / "queries.safetensors", "2" if len(words) > 1 else "4"
            options = [
                "--rates",
                rate,
                "--least",
                "0",
                "--photos",
                "2",
                "--quiet",
                "--out",
                queries,
            ]
            printed = run("calibrate", words[0], PHOTOS, *words[1:], *options)
            calibrated[name] = Source(name, words, queries, rate, printed)
        return calibrated[name]

    return get


def check_info(source, run, folder):
    assert "kept after each block" in run("info", *source.words, "--rate", source.rate)


def check_calibrate(source, run, folder):
    printed = source.calibrated
    assert ("same class, %" if source.classifies else "cosine, %") in printed
    assert f"recommended: rate {source.rate}" in printed
    assert (printed.splitlines()[2].split()[-1] == "-") != source.classifies


def check_map(source, run, folder):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    name, *options = source.pruned
    printed = run("map", name, PHOTOS / "coffee.jpg", *options, "--out", folder)
    assert re.search(r"\d+ of \d+ patches are kept", printed) and "calibrated" not in printed
    assert (f"pruned as {source.queries} says: rate={source.rate}" in printed) == (
        "saved" not in source.name
    )


def check_tune(source, run, folder):
    schedule = folder / "schedule.json"
    run("tune", *source.words, "--speedup", "1", "--rounds", "1", "--out", schedule, "--quiet")
    assert json.loads(schedule.read_text())["keep"]


def check_bench(source, run, folder):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    options = [
        "--rates",
        source.rate,
        "--batch",
        "1",
        "--rounds",
        "1",
        "--quiet",
        "--out",
        folder / "bench",
    ]
    assert "FLOP ratio" in run("bench", *source.words, *options)


def check_export(source, run, folder):
    options = ["--rounds", "1", "--images", PHOTOS, "--format", "torch", "--out", folder]
    stem = Path(source.words[0]).stem
    assert f"{stem}.pt2" in run("export", *source.pruned, *options)
    assert (folder / f"{stem}.pt2").is_file()


def check_infer(source, run, folder):
    tables = pytest.importorskip("pyarrow.dataset", reason="pyarrow is not installed")
    photos, (name, *options) = folder / "photos", source.pruned
    shutil.copytree(PHOTOS, photos, ignore=shutil.ignore_patterns("*a*.jpg"))
    for more in ([], ["--features"]):
        out = folder / f"results{len(more)}"
        assert "3 photos, 0 of them unreadable" in run(
            "infer", name, photos, *options, "--out", out, *more
        )
        rows = tables.dataset(out, format="parquet").to_table().to_pylist()
        assert len(rows) == 3 and ("classes" in rows[0]) == (source.classifies and not more)


def check_eval(source, run, folder):
    if not source.classifies:
        pytest.skip("has no classes")
    pytest.importorskip("torchmetrics", reason="the train extra is not installed")
    for index, photo in enumerate(sorted(PHOTOS.glob("*.jpg"))[:5]):
        (folder / "val" / str(index)).mkdir(parents=True)
        shutil.copy(photo, folder / "val" / str(index))
    options = [
        "--data",
        folder,
        "--pictures",
        "1",
        "--rates",
        "0",
        source.rate,
        "--out",
        folder / "eval",
    ]
    assert "top-1" in run("eval", *source.pruned, *options)
    assert [row["images"] for row in json.loads((folder / "eval" / "eval.json").read_text())] == [
        5,
        5,
    ]


COMMANDS = {
    "info": check_info,
    "calibrate": check_calibrate,
    "map": check_map,
    "tune": check_tune,
    "bench": check_bench,
    "export": check_export,
    "infer": check_infer,
    "eval": check_eval,
}


@pytest.mark.each_choice
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_every_kind_of_model(command, name, sources, run, tmp_path):
    for library in ("PIL", "tqdm"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    COMMANDS[command](sources(name, run), run, tmp_path)


def test_queries_set_the_pruning_unless_the_command_line_does(run, tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    name, queries = FOLDERS["transformers classifier"](tmp_path), tmp_path / "queries.safetensors"
    model = cropr.apply(create_model(name), ratio=0.9, merge=cropr.Merge(2.0), num_outputs=0)
    cropr.save_queries(model, queries)
    merge = "Merge(candidates=2.0, size_weight=2.0)"
    for options, expected in (
        ([], f"ratio=0.9, llf=False, {merge}\n"),
        (["--rate", "2"], f"rate=2, llf=False, {merge} (as asked: rate)\n"),
        (["--rate", "2", "--no-merge"], "rate=2, llf=False (as asked: rate, merge)\n"),
        (["--llf"], f"ratio=0.9, llf=track_parent, {merge} (as asked: llf)\n"),
    ):
        folder = tmp_path / f"results{len(options)}{options[-1:]}"
        out = run("infer", name, PHOTOS, "--queries", queries, *options, "--out", folder, "--quiet")
        assert f"pruned as {queries} says: {expected}" in out
        settings = json.loads((folder / "_settings.json").read_text())
        assert (settings["merge"] == "None") == ("--no-merge" in options)


def test_options_that_the_model_fixes_are_rejected(tmp_path, capsys):
    for source, options, message in (
        (
            "saved by cropr.save",
            ["--arch", "x"],
            "defines the model: leave out --arch, --img-size and --num-classes",
        ),
        (
            "saved by cropr.save",
            ["--no-merge"],
            "defines the pruning: leave out --llf, --merge and --keep",
        ),
        ("transformers features", ["--img-size", "9"], "fixes its img_size: leave out --img-size"),
        ("weight file", ["--num-classes", "9"], "--num-classes) must be 5, those of "),
    ):
        [name] = SOURCES[source](tmp_path)
        queries = [] if source == "saved by cropr.save" else ["--rate", "0"]
        assert (
            cli.main(
                [
                    "infer",
                    str(name),
                    str(PHOTOS),
                    "--out",
                    str(tmp_path / "out"),
                    *queries,
                    *options,
                ]
            )
            == 1
        )
        assert message in capsys.readouterr().err
    (tmp_path / "labelled" / "val" / "one").mkdir(parents=True)
    shutil.copy(PHOTOS / "coffee.jpg", tmp_path / "labelled" / "val" / "one")
    evaluate = ["eval", str(tmp_path / "saved")]
    for options, message in (
        (
            [],
            "is not a run of cropr train: name a folder with photos val/CLASS/*.jpg, --data FOLDER",
        ),
        (
            ["--data", str(tmp_path)],
            "--data must be a folder with photos in val/CLASS, there is no",
        ),
        (
            ["--data", str(tmp_path / "labelled")],
            "must hold 5 folders, one for each class of the model and in their order",
        ),
    ):
        assert cli.main([*evaluate, *options]) == 1 and message in capsys.readouterr().err


def test_info_takes_a_torchvision_model_by_name(run):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    out = run("info", "vit_b_32", "--rate", "1")
    assert (
        "torchvision.models.vision_transformer.VisionTransformer" in out
        and "50 of width 768" in out
    )


def test_info_tells_that_photos_keep_as_many_tokens_as_they_need(run, tmp_path):
    model = cropr.apply(reference_vit().eval(), rate=5, merge=True, num_outputs=0)
    cropr.save(cropr.calibrate(model, torch.randn(4, 3, 64, 64)), tmp_path / "calibrated")
    highest = f"{model.cropr.thresholds.rates[-1]:g}"
    text = f"up to rate {highest} as many tokens as each needs, these on average"
    assert text in run("info", tmp_path / "calibrated")


def test_devices_that_are_not_there_are_named(tmp_path, capsys):
    for name, message in (
        ("tpu9000", "--device must be one of torch, such as cpu, cuda or cuda:1, got tpu9000"),
        ("cuda:99", f"--device cuda:99: torch finds {torch.cuda.device_count()} GPUs"),
    ):
        assert cli.main(["doctor", "--device", name]) == 1
        assert message in capsys.readouterr().err


def test_pixels_are_those_of_the_model_unless_overridden(tmp_path):
    from cropr_kernels.inference.loading import load_with_queries

    name = FOLDERS["transformers classifier"](tmp_path)
    options = dict(
        model=name, queries=None, rate=0, keep=None, llf=False, merge=False, mean=None, std=None
    )
    saved_pixels = load_with_queries(argparse.Namespace(**options)).pixels
    overridden = load_with_queries(argparse.Namespace(**options | {"mean": [0.0] * 3})).pixels
    assert saved_pixels.mean == (0.1, 0.2, 0.3)
    assert tuple(overridden.mean) == (0.0,) * 3 and overridden.std == saved_pixels.std
    images = torch.tensor([0.5, 0.7, 0.9]).view(3, 1, 1).expand(3, 2, 2)
    torch.testing.assert_close(saved_pixels.normalize(images), torch.ones(3, 2, 2))


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


def test_the_version_names_package_torch_triton_and_device(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    prefix = f"cropr_kernels {cropr.__version__}, torch {torch.__version__}, triton "
    printed = capsys.readouterr().out
    assert printed.startswith(prefix) and ", device " in printed and printed.count("\n") == 1
