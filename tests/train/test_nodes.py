"""Training on two nodes, each an agent of torchrun on the loopback address: one is killed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.extras import require
from helpers.inference import contents, write_folder

from cropr_kernels.train import Config, train

require("timm", "torchmetrics", "torchvision", "PIL")
pytestmark = [pytest.mark.slow(waits=True), pytest.mark.filterwarnings("ignore")]

# A step takes time, so that a node can be killed between two.
STEPS = """
import sys, time, torch
from cropr_kernels.train import Config, loop
torch.set_num_threads(1)
step, plain_run = loop.Run._step, loop.Run.run
def slow(run, loader):
    time.sleep(0.2)
    return step(run, loader)
def noted(run):
    with open(sys.argv[1] + "/starts", "a") as file:
        print(run.process.world, run.step, file=file)
    return plain_run(run)
loop.Run._step, loop.Run.run = slow, noted
loop.train(Config.read(sys.argv[1] + "/config.json"), sys.argv[1], show=False)
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for index, label in enumerate(("a", "b")):
        named = list(contents(16).items())[8 * index : 8 * index + 8]
        for split in ("train", "val"):
            write_folder(folder / split / label, dict(named))
    return folder


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start_node(out, port, is_host):
    """Start an agent of torchrun with one process, in a session of its own."""
    settings = f"is_host={int(is_host)},last_call_timeout=10"
    launch = ["-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1"]
    launch += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=run"]
    launch += [f"--rdzv-conf={settings}", "--max-restarts=3", "--monitor-interval=0.1"]
    with open(out.parent / f"node{int(is_host)}", "w") as log:
        return subprocess.Popen(
            [sys.executable, *launch, str(out.parent / "run.py"), str(out)],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def kill_node(agent):
    """Kill an agent and its workers at once, as the loss of power does."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ends just now
            _, _, fields = path.read_text().rpartition(")")
            parents[int(path.parent.name)] = int(fields.split()[1])
    doomed = [agent.pid]
    for process in doomed:
        doomed += [child for child, parent in parents.items() if parent == process]
    for process in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    agent.wait()


def lines_of(out):
    path = out / "metrics.jsonl"
    texts = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, texts) if "loss" in line]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_killed_node_leaves_a_run_that_goes_on_from_its_checkpoint_with_the_same_losses(
    parallel, photos, tmp_path
):
    options = dict(model_options=("depth=3", "embed_dim=48", "num_heads=2"), patch_size=8)
    options |= dict(img_size=(32, 32), rate=3, batch_size=4, epochs=10, workers=0, device="cpu")
    options |= dict(log_steps=1, save_steps=5, eval_epochs=10, calibrate=0, parallel=parallel)
    config = Config(data=str(photos), **options)
    train(config, tmp_path / "alone", show=False)
    out = tmp_path / "nodes"
    out.mkdir()
    (out / "config.json").write_text(config.to_json())
    (tmp_path / "run.py").write_text(STEPS)
    port = free_port()
    first = start_node(out, port, is_host=True)
    second = start_node(out, port, is_host=False)
    try:
        deadline = time.monotonic() + 300
        while not any(line["step"] >= 12 for line in lines_of(out)):
            assert first.poll() is None and time.monotonic() < deadline, read_logs(tmp_path)
            time.sleep(0.1)
        kill_node(second)
        saved = torch.load(out / "last.pt")["step"]
        assert first.wait(300) == 0, read_logs(tmp_path)
    finally:
        for process in (first, second):
            if process.poll() is None:
                kill_node(process)
    starts = (out / "starts").read_text().splitlines()
    assert starts == ["2 0", "2 0", f"1 {saved}"] and 10 <= saved < 40
    alone, nodes = lines_of(tmp_path / "alone"), lines_of(out)
    assert [line["step"] for line in nodes] == [line["step"] for line in alone]
    assert len(nodes) == 40
    for expected, line in zip(alone, nodes):
        torch.testing.assert_close(line["loss"], expected["loss"], rtol=2e-4, atol=2e-4)


def read_logs(folder):
    return "".join((folder / f"node{index}").read_text()[-3000:] for index in range(2))
