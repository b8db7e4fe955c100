"""The benchmarks as a tree: every script starts, imports go one way, files stay short; results and
timing."""

import ast
import importlib
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.utils.results import Results

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "benchmarks").rglob("*.py"))
ORDER = ["utils", "baselines", "kernels", "models", "accuracy", "report"]


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


SCRIPTS = [module_of(path) for path in FILES if '__name__ == "__main__"' in path.read_text()]
MODULES = [module_of(path) for path in FILES if path.name != "__init__.py"]


def import_or_skip(module):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] not in (
            "benchmarks",
            "cropr_kernels",
            "examples",
        ):
            pytest.skip(f"an extra is not installed: {error}")
        raise


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports_and_every_script_prints_its_usage(module, monkeypatch, capsys):
    imported = import_or_skip(module)
    if module in SCRIPTS:
        monkeypatch.setattr(sys, "argv", [module, "--help"])
        with pytest.raises(SystemExit) as stopped:
            imported.main()
        assert stopped.value.code == 0
        assert f"python -m {module.removesuffix('.__main__')}" in capsys.readouterr().out


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_import_from_their_own_folder_or_from_those_before_it_and_no_scripts(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks."):
            other = node.module.split(".")[1]
            assert ORDER.index(other) <= ORDER.index(path.relative_to(ROOT).parts[1]), node.module
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                assert name not in SCRIPTS, f"{path.name} imports the script {name}"


def test_no_file_changes_sys_path_or_outgrows_its_reader():
    for folder in ("benchmarks", "tests", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            touched = [
                node for node in ast.walk(ast.parse(text)) if ast.unparse(node) == "sys.path"
            ]
            prepended = text.replace("syspath_prepend(str(tmp_path))", "").count(
                "syspath_" + "prepend("
            )
            assert not touched and not prepended, path
            assert folder == "tests" or len(text.splitlines()) <= (400), path


def test_a_run_resumes_at_its_first_missing_cell(tmp_path, capsys):
    path, cells = tmp_path / "results.json", [((1, 2), "a", 0), ((1, 2), "b", 1), ((3, 4), "a", 2)]
    first = Results(path, {"device": "here"}, keys=("shape", "method"))
    assert list(first.remaining(cells)) == cells
    first.add({"shape": [1, 2], "method": "a", "us": 1.0})
    second = Results(path, {"device": "there"}, keys=("shape", "method"))
    assert list(second.remaining(cells)) == cells[1:]
    second.add({"shape": [3, 4], "method": "a", "us": 2.0})
    stored = json.loads(path.read_text())
    assert stored["environment"] == {"device": "there"} and [
        row["us"] for row in stored["rows"]
    ] == [1.0, 2.0]
    assert list(Results(path, {}, keys=("shape", "method")).remaining(cells)) == cells[1:2]
    assert (
        list(second.remaining(cells, minutes=-1)) == []
        and "out of minutes" in capsys.readouterr().out
    )
    assert Results(path, {}).rows == [], "without keys a run starts afresh"
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    assert list(
        Results(path, {}, keys=("shape", "L2")).remaining([((1, 2), None), ((5, 6), None)])
    ) == [((5, 6), None)]


def test_every_baseline_names_a_trained_one_and_known_schedules():
    from benchmarks.baselines.registry import BASELINES, ROWS, SCHEDULES

    by_name = {baseline.name: baseline for baseline in BASELINES}
    assert len(by_name) == len(BASELINES) and len(set(ROWS)) == len(ROWS)
    for baseline in BASELINES:
        assert baseline.trained_as is None or by_name[baseline.trained_as].trained
        assert {*baseline.timed, *baseline.trained} <= set(SCHEDULES[12])
        assert bool(baseline.keeps) != baseline.variant


@pytest.mark.slow
@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other libraries have no such settings"
)
def test_timed_calls_on_a_cpu_reuse_their_memory():
    code = """
import resource, torch
from benchmarks.utils import timing
x = torch.ones(1 << 24)  # 64 MiB, which glibc returns to the system by default
timing.timed({"add": lambda x: x + 1}, x, rounds=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
timing.timed({"add": lambda x: x + 1}, x, rounds=38)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (40 * x.nbytes / 4096))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert float(done.stdout) < 0.25, "of what it is by default"
