"""The folder of a run: its lock, its data, and damaged files in it."""

import fcntl
import json
import multiprocessing
import os
import re
import socket
import stat
import time

import pytest
import torch
from helpers.extras import require
from helpers.runs import Broken, Explodes

import cropr_kernels as cropr
from cropr_kernels.cli import __main__ as cli
from cropr_kernels.train import Config, build, checkpoint, folder, train
from cropr_kernels.train.data import Data
from cropr_kernels.train.loop import rebuild

require("torchmetrics")
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = Config(batch_size=8, epochs=2, workers=0, log_steps=1, device="cpu")


def run(out, *, train_count=24, val_count=4, classes=("blue", "red")):
    data = Data(Broken(train_count, set()), Broken(val_count, set()), list(classes))
    return train(SMALL, out, data=data, task=Explodes(set()), show=False)


def steps(out):
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def ended(tmp_path):
    """Return the folder of a finished run of six steps, and its metrics."""
    return tmp_path / "run", run(tmp_path / "run")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            dict(classes=("red", "blue")),
            "classes[0] was 'blue', is 'red'; classes[1] was 'red', is 'blue'",
        ),
        (dict(classes=("blue", "red", "white")), "number of classes was 2, is 3"),
        (dict(train_count=25), "number of training samples was 24, is 25"),
        (dict(val_count=3), "number of validation samples was 4, is 3"),
    ],
)
def test_a_run_resumes_on_its_own_data_only(ended, other, message):
    out, _ = ended
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(
        ValueError, match=re.escape(f"train: {out} holds a run on other data: {message}") + "$"
    ):
        run(out, **other)
    assert {path: path.read_bytes() for path in out.iterdir() if path.name != ".lock"} == {
        path: content for path, content in before.items() if path.name != ".lock"
    }


@pytest.mark.parametrize(
    "name", ["model", "config", "classes", "optimizer", "scaler", "ema", "step", "best", "totals"]
)
def test_a_missing_field_of_a_checkpoint_is_named(ended, name):
    out, _ = ended
    state = torch.load(out / "last.pt")
    del state[name]
    torch.save(state, out / "last.pt")
    with pytest.raises(ValueError, match=rf"last\.pt holds no {name}$"):
        run(out)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(optimizer={}), "does not fit this model"),
        (dict(optimizer=3), "does not fit this model"),
        (dict(model=3), "holds no model"),
        (dict(model={"weight": torch.tensor([1.0, torch.nan])}), "holds NaN in weight"),
        (dict(config="{"), "is not JSON"),
        (dict(config=3), "is not JSON"),
    ],
)
def test_illegal_fields_of_a_checkpoint_are_named(ended, values, message):
    out, _ = ended
    torch.save(torch.load(out / "last.pt") | values, out / "last.pt")
    with pytest.raises(ValueError, match=rf"last\.pt.* {message}"):
        run(out)


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"\xff\xfe", b"{", b"[]", b'{"lr": 1e999}'])
def test_a_damaged_configuration_is_named(ended, content, capsys):
    out, _ = ended
    (out / "config.json").write_bytes(content)
    assert cli.main(["train", "--out", str(out)]) == 1
    assert re.match(r"cropr train: .*/config\.json\b.*\n$", capsys.readouterr().err)
    run(out)  # takes the configuration of the checkpoint
    assert Config.read(out / "config.json") == SMALL


def test_lines_of_the_log_that_cannot_be_read_are_dropped_and_counted(ended):
    out, metrics = ended
    log, intact = out / "metrics.jsonl", steps(out)
    first, *rest = log.read_bytes().splitlines(keepends=True)
    for damaged in (
        b"\0" * len(first),
        b"\0" * 8 + first,
        b"\xff" + first,
        b"3\n",
        b"{}\n",
        first[: len(first) // 2],
    ):
        log.write_bytes(damaged.rstrip(b"\n") + b"\n" + b"".join(rest))
        with pytest.warns(
            UserWarning, match=r"metrics\.jsonl: 1 line\(s\) cannot be read and are skipped"
        ):
            assert run(out) == metrics
        assert steps(out) == intact[1:]
    assert len(folder.read_log(log)) == len(intact) - 1


@pytest.mark.parametrize("lost", [1, 100])
def test_a_finished_run_is_evaluated_again_if_its_last_evaluation_is_lost(ended, lost):
    out, metrics = ended
    log = out / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)[:-lost]
    log.write_text("".join(lines)) if lines else log.unlink()
    again = run(out)
    assert {**again, "seconds": 0} == {**metrics, "seconds": 0}
    assert run(out) == again and steps(out) == [json.loads(line)["step"] for line in lines] + [6]


def hold(out, pipe):
    """Lock a folder, and start a process that outlives this one, as workers that read photos
    may."""
    with folder.locked(out):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,))
        child.start()
        pipe.send(child.pid)
        time.sleep(3600)


def test_a_folder_is_locked_until_its_process_ends_even_by_kill(tmp_path):
    ours, theirs = multiprocessing.Pipe()
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, theirs))
    holder.start()
    child = ours.recv()
    try:
        here = re.escape(
            f"train: {tmp_path} is in use by process {holder.pid} on {socket.gethostname()}"
        )
        with pytest.raises(RuntimeError, match=here):
            run(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        holder.kill()
        holder.join()
        run(tmp_path)
    finally:
        holder.kill()
        os.kill(child, 9)


def test_runs_work_on_file_systems_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    run(tmp_path)


def test_a_process_stops_when_its_torchrun_has_ended(tmp_path, monkeypatch):
    parents = iter([10, 10, 10] + [1] * 99)
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(
        RuntimeError,
        match=r"train: torchrun, which started this process, is gone; the same command",
    ):
        run(tmp_path)
    assert steps(tmp_path) == [1, 2]
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")  # nohup: only the shell is gone
    parents = iter([10] + [1] * 99)
    run(tmp_path)


def test_weights_that_are_nan_raise(tmp_path):
    model = cropr.create_vit("vit_tiny_patch16_224", num_classes=2)
    with torch.no_grad():
        model.norm.bias[3] = torch.nan
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    config = Config(weights=str(tmp_path / "weights.pt"), rate=8)
    with pytest.raises(ValueError, match=r"weights\.pt holds NaN in norm\.bias"):
        build.task(config, 2)
    state = {"model": model.state_dict(), "config": Config().to_json(), "classes": ["blue", "red"]}
    checkpoint.save(tmp_path / "best.pt", state)
    with pytest.raises(ValueError, match=r"best\.pt holds NaN in norm\.bias"):
        rebuild(tmp_path)
    del state["classes"]
    checkpoint.save(tmp_path / "best.pt", state)
    with pytest.raises(ValueError, match=r"best\.pt holds no classes"):
        rebuild(tmp_path)


def test_a_checkpoint_and_its_folder_are_synced_before_training_goes_on(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append(stat.S_ISDIR(os.fstat(file).st_mode))
    )
    checkpoint.save(tmp_path / "last.pt", {"model": {}})
    assert synced == [False, True]


def test_skipped_files_are_counted(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="needs the train extra")
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    (tmp_path / "train" / "a" / "phone.heic").write_bytes(b"")
    from cropr_kernels.train.data import load_data

    with pytest.warns(UserWarning, match=r"train: \(skipped 1 files: 1 .heic\)"):
        assert len(load_data(Config(data=str(tmp_path))).train) == 2
