"""`cropr view`: what it needs, where it listens, and what it leaves."""

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from helpers.extras import require

import cropr_kernels as cropr
from cropr_kernels.cli import __main__ as cli
from cropr_kernels.cli import view

require("PIL")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(cropr.create_vit("vit_tiny_patch16_224", num_classes=5).state_dict(), path)
    return path


def test_without_gradio_the_error_names_the_extra(weights, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["view", str(weights)]) == 1
    assert "pip install gradio (or the extra [view] of cropr_kernels)" in capsys.readouterr().err


@pytest.mark.slow
def test_without_queries_and_photos_there_is_nothing_to_calibrate_on(
    weights, monkeypatch, tmp_path, capsys
):
    pytest.importorskip("gradio", reason="the view extra is not installed")
    monkeypatch.setattr(view, "EXAMPLES", tmp_path / "none")
    assert cli.main(["view", str(weights)]) == 1
    assert "name photos or folders of them, or pass --queries FILE" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_listens_on_this_machine_only_and_leaves_nothing(weights, tmp_path):
    pytest.importorskip("gradio", reason="the view extra is not installed")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "cropr_command", "view", str(weights)],
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = iter(process.stdout.readline, "")
        address = next(line for line in lines if line.startswith("http")).split()[0]
        port = int(re.fullmatch(r"http://127.0.0.1:(\d+)/", address)[1])
        with urllib.request.urlopen(address, timeout=30) as page:
            assert page.headers["content-security-policy"].startswith("default-src 'self'")
        listening = [
            line.split()[1]
            for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
            if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
        ]
        assert listening == [f"0100007F:{port:04X}"]
        assert list(temporary.glob("cropr-view-*"))
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.splitlines()[-1:] == [
        "cropr view: terminated; the page is closed, nothing was kept"
    ]
    assert [path for path in temporary.iterdir() if "torch" not in path.name] == []
    assert {path.name for path in tmp_path.iterdir()} == {"temporary"}
