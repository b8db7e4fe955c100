"""Training: what interrupts it, who shares it, and what it refuses."""

import contextlib
import json
import os
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.extras import require
from helpers.processes import run_forked
from helpers.runs import Broken, Explodes
from torch import nn

import cropr_kernels as cropr
from cropr_kernels.cli import __main__ as cli
from cropr_kernels.train import Config, checkpoint, loop, train
from cropr_kernels.train.data import Data, load_data
from cropr_kernels.train.loop import rebuild

require("torchmetrics")
image = pytest.importorskip("PIL.Image", reason="needs the train extra")

SMALL = dict(
    model_options=("depth=4", "embed_dim=48", "num_heads=2", "mlp_ratio=2.0"), patch_size=8,
    img_size=(32, 32),
    rate=3, epochs=2, batch_size=8, lr=1e-3, workers=0, log_steps=1, device="cpu", scale=(0.8, 1.0),
)  # fmt: skip
CLASSES = ["blue", "red"]


def write_photos(folder, count=20):
    """A folder per class: a blue or a red square somewhere in the noise."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 120, (36, 40, 3), generator=generator, dtype=torch.uint8)
                top, left = torch.randint(0, 16, (2,), generator=generator).tolist()
                pixels[top : top + 20, left : left + 20, 2 * (1 - label)] = 250
                image.fromarray(pixels.numpy()).save(folder / split / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


def config(photos, **options):
    return Config(**{"data": str(photos), **SMALL, **options})


def losses(out):
    """Lines of the log, without times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("images/s", None)
        line.get("val", {}).pop("seconds", None)
    return lines


@pytest.mark.filterwarnings("ignore")
def test_it_learns_and_every_part_of_a_run_is_written(photos, tmp_path):
    run_config = config(photos, epochs=10, flip=0.0, lr=3e-3, warmup_epochs=1)
    metrics = train(run_config, tmp_path, show=False)
    assert metrics["top-1"] >= 90 and len(metrics["aux"]) == 3 and metrics["images"] == 40
    assert {path.name for path in tmp_path.iterdir()} == {
        ".lock",
        "config.json",
        "metrics.jsonl",
        "last.pt",
        "best.pt",
    }
    lines = losses(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 51))
    assert lines[0]["loss"] == pytest.approx(lines[0]["main"] + lines[0]["aux"])
    task, saved_config, classes = rebuild(tmp_path)
    assert classes == CLASSES and saved_config == run_config and not task.training
    # A run that is over tells how it ended
    assert train(saved_config, tmp_path, show=False) == metrics


RECIPES = {
    "plain": {},
    "everything": dict(ema=0.9, accumulate=2, mixup=0.5, cutmix=0.5, drop_path=0.2, clip_grad=1.0,
                       curriculum=0.5,
                       llf=True, amp="bfloat16", auto_augment="rand-m5-mstd0.5", erasing=0.3,
                       workers=1, calibrate=8),
    "float16": dict(amp="float16", grad_checkpointing=True),
}  # fmt: skip


# Kills itself after the so-manieth call of something in train.loop.
KILLED = """
import functools, os, signal, sys
from cropr_kernels.train import Config, loop
out, moment, count = sys.argv[1:]
*owners, name = moment.split(".")
owner = functools.reduce(getattr, owners, loop)
call, calls = getattr(owner, name), []
def counted(*args, **kwargs):
    result = call(*args, **kwargs)
    calls.append(name)
    if len(calls) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, counted)
loop.train(Config.read(out + "/config.json"), out, show=False)
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        name if name == "everything" else pytest.param(name, marks=pytest.mark.slow(waits=True))
        for name in RECIPES
    ],
)
def test_killed_at_any_moment_it_resumes_to_the_same_losses(name, photos, tmp_path):
    run_config = config(photos, save_steps=3, epochs=3, **RECIPES[name])
    train(run_config, tmp_path / "whole", show=False)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_text(run_config.to_json())
    for moment, count in (
        ("Run._log", 5),
        ("checkpoint.torch.save", 2),
        ("checkpoint.atomic_write", 1),
    ):
        ended = run_forked(KILLED, [str(cut), moment, str(count)], tmp_path / moment)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert cli.main(["train", "--out", str(cut), "--quiet"]) == 0
    assert losses(cut) == losses(tmp_path / "whole")
    uninterrupted, resumed = (
        torch.load(folder / "last.pt")["model"] for folder in (tmp_path / "whole", cut)
    )
    assert all(torch.equal(uninterrupted[key], resumed[key]) for key in uninterrupted)


# A thread of gloo's that still ran when Python exits would abort the process, now and then: none
# may be left. One that has ended stays in /proc for a moment.
PROCESSES = """
import contextlib, glob, os, sys, time
import torch
from cropr_kernels.train import Config, loop
torch.set_num_threads(1)
# each process measures something else: the first one's verdict is that of all
loop.measured_amp = lambda device: (("none", "bfloat16")[int(os.environ["RANK"])], "measured")
def threads_of_gloo():
    for path in glob.glob("/proc/self/task/*/comm"):
        with contextlib.suppress(OSError):
            if "gloo" in open(path).read():
                yield path
loop.train(Config.read(sys.argv[1] + "/config.json"), sys.argv[1], show=False)
for _ in range(600):
    if not any(threads_of_gloo()):
        break
    time.sleep(0.1)
else:
    raise AssertionError("threads of gloo are left")
"""


def free_port():
    """Return a port that no outgoing connection is given meanwhile."""
    for port in range(20000 + os.getpid() % 10000, 32000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return str(port)
    raise OSError("no port is free")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_give_the_result_of_one(parallel, photos, tmp_path, monkeypatch):
    shared = dict(
        epochs=2, accumulate=2, clip_grad=1.0, llf=True, save_steps=4, calibrate=12, amp="auto"
    )
    run_config = config(photos, parallel=parallel, **shared)
    monkeypatch.setattr(loop, "measured_amp", lambda device: ("none", "measured"))
    train(run_config, tmp_path / "one", show=False)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "config.json").write_text(run_config.to_json())
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with ThreadPoolExecutor(2) as pool:
        ended = [
            pool.submit(
                run_forked,
                PROCESSES,
                [str(tmp_path / "two")],
                tmp_path / rank,
                **group | {"RANK": rank, "LOCAL_RANK": rank},
            )
            for rank in ("0", "1")
        ]
    for process in ended:
        assert process.result().returncode == 0, process.result().stderr[-3000:]
    alone_log, shared_log = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(alone_log) == len(shared_log)
    assert [line["note"].split(" ")[0] for line in shared_log if "note" in line] == [
        "amp=auto",
        "queries",
    ]
    for alone, shared in zip(alone_log, shared_log):
        assert {**alone, **dict.fromkeys(("loss", "main", "aux", "val"))} == {
            **shared, **dict.fromkeys(("loss", "main", "aux", "val"))
        }  # fmt: skip
        if "loss" in alone:
            torch.testing.assert_close(shared["loss"], alone["loss"], rtol=2e-4, atol=2e-4)
    assert alone_log[-1]["val"]["images"] == shared_log[-1]["val"]["images"] == 40
    alone, shared = (
        torch.load(folder / "last.pt")["model"] for folder in (tmp_path / "one", tmp_path / "two")
    )
    for key in alone:
        torch.testing.assert_close(shared[key], alone[key], rtol=1e-2, atol=3e-3)
    # and goes on where it stopped, with any number of processes
    longer = torch.load(tmp_path / "two" / "last.pt")
    assert longer["step"] == alone_log[-1]["step"]
    rebuilt, _, _ = rebuild(tmp_path / "two")
    assert isinstance(rebuilt, nn.Module)


@pytest.mark.filterwarnings("ignore")
def test_a_corrupt_image_is_counted_in_the_log(tmp_path):
    folder = write_photos(tmp_path / "photos", count=8)
    (folder / "train" / "blue" / "03.png").write_bytes(b"no picture")
    broken = folder / "val" / "red" / "01.png"
    broken.write_bytes(broken.read_bytes()[:200])
    train(config(folder, epochs=1), tmp_path / "out", show=False)
    lines = losses(tmp_path / "out")
    assert lines[-2]["skipped"] == 1 and lines[-1]["val"]["skipped"] == 1


@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted(tmp_path):
    data = Data(Broken(24, set()), Broken(4, set()), CLASSES)
    small = Config(
        batch_size=8, epochs=2, workers=0, log_steps=1, device="cpu", lr=0.1, max_bad_steps=2
    )
    task = Explodes({2})
    train(small, tmp_path / "one", data=data, task=task, show=False)
    assert losses(tmp_path / "one")[-2]["not_finite"] == 1
    assert bool(task.weight.isfinite())
    with pytest.raises(
        RuntimeError, match=r"not finite in 2 steps in a row, the last 3 .* a lower lr"
    ):
        train(small, tmp_path / "two", data=data, task=Explodes({3, 4}), show=False)


class Steep(Explodes):
    """A finite loss whose gradient is not, at some steps."""

    def forward(self, images, target=None):
        self.calls += 1
        offset = self.weight.detach() if self.calls in self.bad else 0.0
        return {"main": (self.weight - offset).abs().sqrt().sum(), "aux": torch.zeros(())}


@pytest.mark.filterwarnings("ignore")
def test_a_gradient_that_is_not_finite_changes_nothing_either(tmp_path):
    data = Data(Broken(24, set()), Broken(4, set()), CLASSES)
    task = Steep({2})
    train(
        Config(batch_size=8, epochs=1, workers=0, log_steps=1, device="cpu"),
        tmp_path,
        data=data,
        task=task,
        show=False,
    )
    assert losses(tmp_path)[-2]["not_finite"] == 1 and bool(task.weight.isfinite())


@pytest.mark.filterwarnings("ignore")
def test_a_run_from_a_weight_file_is_rebuilt_without_it(photos, tmp_path):
    weights = tmp_path / "weights.pt"
    torch.save(cropr.create_vit("eva02_tiny_patch14_224", num_classes=7).state_dict(), weights)
    run_config = Config(
        data=str(photos),
        weights=str(weights),
        img_size=(28, 28),
        rate=0,
        epochs=1,
        batch_size=20,
        workers=0,
        device="cpu",
    )
    train(run_config, tmp_path / "run", show=False)
    weights.unlink()
    task, config, _ = rebuild(tmp_path / "run")
    assert config.model == "eva02_tiny_patch14_224" and task.backbone.head.out_features == 2


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path):
    import resource

    path = tmp_path / "last.pt"
    checkpoint.save(path, {"model": {"w": torch.ones(3)}})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(
            RuntimeError, match=r"last.pt cannot be written: .*; the previous one is kept"
        ):
            checkpoint.save(path, {"model": {"w": torch.ones(10**5)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.load(path)["model"]["w"].shape == (3,)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.filterwarnings("ignore")
def test_other_settings_damaged_checkpoints_and_missing_data_raise(photos, tmp_path):
    out = tmp_path / "run"
    train(config(photos, epochs=1), out, show=False)
    with pytest.raises(
        ValueError, match=r"holds another run: rate: 4, not 3; lr: 0.002, not 0.001\. Use another"
    ):
        train(config(photos, epochs=1, rate=4, lr=2e-3), out, show=False)
    state = torch.load(out / "best.pt")
    state["model"]["backbone.more"] = state["model"].pop("backbone.norm.weight")
    checkpoint.save(out / "best.pt", state)
    with pytest.raises(
        ValueError,
        match=r"(?s)not fit this model: .*Missing key.*backbone.norm.weight.*Unexpected "
        r"key.*backbone.more",
    ):
        rebuild(out)
    (out / "best.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"best\.pt cannot be read"):
        rebuild(out)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        rebuild(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train_split names .*, which does not exist"):
        load_data(config(photos, train_split=("training",)))
    with pytest.raises(ValueError, match="train_split must be 1 paths for classification"):
        load_data(config(photos, train_split=("train", "val")))


@pytest.mark.filterwarnings("ignore")
def test_the_commands_train_measure_and_draw(photos, tmp_path, capsys):
    options = [
        f"{name}={','.join(map(str, v)) if isinstance(v, tuple) else v}"
        for name, v in SMALL.items()
    ]
    out = tmp_path / "run"
    arguments = [
        "train",
        "--data",
        str(photos),
        "--out",
        str(out),
        "--quiet",
        *options,
        "calibrate=8",
        "epochs=1",
    ]
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 40
    assert cli.main(["eval", str(out), "--rates", "0", "3", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "rate=0" in text and "rate=3" in text and "top-1" in text
    assert [row["schedule"] for row in json.loads((out / "eval.json").read_text())] == [
        "rate=0",
        "rate=3",
    ]
    for name in ("maps.png", "curves.png"):
        assert image.open(out / name).size[0] > 300
    queries = tmp_path / "queries.safetensors"
    for command, message in [
        (["info", str(out)], "kept after each block  13 10 7"),
        (
            ["map", str(out), str(photos / "val" / "red"), "--out", str(tmp_path / "maps")],
            "6 of 16 patches are kept",
        ),
        (
            ["calibrate", str(out), str(photos / "val"), "--out", str(queries), "--quiet"],
            "recommended: rate",
        ),
        (
            ["bench", str(out), "--rounds", "1", "--out", str(tmp_path / "bench"), "--quiet"],
            "zero-copy",
        ),
    ]:
        assert cli.main(command) == 0
        printed = capsys.readouterr().out
        assert message in printed, printed
    assert (
        cli.main(
            [
                "export",
                str(out),
                "--format",
                "torch",
                "--rounds",
                "1",
                "--out",
                str(tmp_path / "files"),
            ]
        )
        == 0
    )
    assert (tmp_path / "files" / "run.pt2").is_file() and "run.pt2" in capsys.readouterr().out
    assert (
        cli.main(
            [
                "infer",
                str(out),
                str(photos / "val"),
                "--rate",
                "2",
                "--out",
                str(tmp_path / "r"),
                "--quiet",
            ]
        )
        == 0
    )
    assert "40 photos, 0 of them unreadable" in capsys.readouterr().out
    mixed = tmp_path / "mixed"
    for split in ("train", "val"):
        shutil.copytree(photos / split, mixed / split)
    other = shutil.copytree(mixed, tmp_path / "other")
    for split in ("train", "val"):
        (other / split / "blue").rename(other / split / "green")
    for path in (mixed / "train").rglob("*.png"):
        path.write_bytes(b"no picture")
    for arguments, message in [
        (
            [
                "train",
                "--data",
                str(mixed),
                "--out",
                str(tmp_path / "y"),
                "--quiet",
                *options,
                "workers=1",
            ],
            "16 samples in a row",
        ),
        (["train", "--out", str(tmp_path / "x"), "rate"], "options must be name=value, got 'rate'"),
        (["train", "--out", str(tmp_path / "x")], "name the folder of the dataset: --data FOLDER"),
        (["train", "--out", str(out), "epochs=3"], "holds another run: epochs: 3, not 1"),
        (
            ["train", "--data", str(other), "--out", str(out)],
            "other data: classes[0] was 'blue', is 'green'",
        ),
        (["eval", str(out), "--data", str(other)], "other data: classes[0] was 'blue', is 'green'"),
        (
            ["eval", str(tmp_path / "none")],
            "none is not a run of cropr train: name a folder with photos val/CLASS/*.jpg, --data",
        ),
        (["export", str(out), "--llf"], "defines the pruning: leave out --llf, --merge and --keep"),
    ]:
        assert cli.main(arguments) == 1
        printed = capsys.readouterr().err
        assert message in printed and "Traceback" not in printed
    # a folder without a checkpoint is free
    again = [
        "train",
        "--data",
        str(photos),
        "--out",
        str(tmp_path / "y"),
        "--quiet",
        *options,
        "epochs=1",
        "lr=0.002",
    ]
    assert cli.main(again) == 0
