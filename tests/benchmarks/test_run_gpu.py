"""benchmarks/run_gpu.sh without a GPU: python3 and compute-sanitizer are stand-ins that record
their arguments."""

import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "run_gpu.sh"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
PYTHON = r"""#!/usr/bin/env bash
[[ $1 == -c || $1 == - ]] && exec {python} "$@"
printf '%s %s\n' "${{CROPR_SHARD:-}}" "${{*@Q}}" >> calls
[[ $1 == setup.py ]] && touch cropr_kernels/_C{suffix}
[[ -n ${{FAIL:-}} && $* == *$FAIL* ]] && exit 4
while (($#)); do
  [[ $1 == --out && $2 == *.json ]] && echo "{{}}" > "$2"
  shift
done
exit 0
"""
# A clock that stands still until a command takes all the time: no verdict depends on a real one.
DATE = r"""#!/usr/bin/env bash
cat now 2>/dev/null || echo 0
"""
TIMEOUT = r"""#!/usr/bin/env bash
shift 2
[[ -n ${SLOW:-} && $* == *$SLOW* ]] || exec "$@"
SLOW= "$@"
echo 100000 > now
exit 124
"""
SANITIZER = r"""#!/usr/bin/env bash
printf '%q ' "$@" >> sanitizer_calls
echo "caching $PYTORCH_NO_CUDA_MEMORY_CACHING" >> sanitizer_calls
[[ $* == *"${REPORT_OF:-none}"* ]] && printf '%s\n' "$REPORT"
while [[ $1 != python3 ]]; do shift; done
exec "$@"
"""


@pytest.fixture
def tree(tmp_path):
    """Return a copy of the source tree as far as the script reads it, with the stand-ins."""
    for folder in ("benchmarks/results", "cropr_kernels/ops", "csrc", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "benchmarks")
    shutil.copytree(
        ROOT / "cropr_kernels" / "ops" / "triton", tmp_path / "cropr_kernels" / "ops" / "triton"
    )
    for name in ("csrc/one.cpp", "CMakeLists.txt", "setup.py"):
        (tmp_path / name).touch()
    for name, text in (
        ("python3", PYTHON.format(python=sys.executable, suffix=SUFFIX)),
        ("compute-sanitizer", SANITIZER),
        ("date", DATE),
        ("timeout", TIMEOUT),
    ):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run(tree, *steps, **environment):
    """Run the script; return its exit code, its output, and the commands."""
    for name in ("calls", "sanitizer_calls", "now"):
        (tree / name).unlink(missing_ok=True)
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CROPR_DATA", "OUT", "LIMIT")
    }
    path = f"{tree / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", tree / "benchmarks" / "run_gpu.sh", *steps],
        env=inherited | {"PATH": path} | environment,
        capture_output=True,
        text=True,
    )
    calls = (tree / "calls").read_text().splitlines() if (tree / "calls").exists() else []
    return done.returncode, done.stdout + done.stderr, calls


def begun(printed):
    return re.findall(r"^== (\w+)", printed, flags=re.MULTILINE)


def test_all_steps_run_in_order_and_their_commands_parse(tree, monkeypatch):
    code, printed, calls = run(tree, CROPR_DATA=str(tree))
    assert code == 0, printed
    order = ["build", "smoke", "tests", "stress", "sanitize", "ops", "kernels", "networks"]
    assert begun(printed)[: len(order)] == order and begun(printed)[-1] == "coco128"

    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def stop(parser, arguments=None):
        parse(parser, arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    modules = []
    for call in calls:
        words = shlex.split(call)
        if words[0] != "-m" or words[1] == "pytest":
            continue
        modules.append(words[1])
        if words[1] == "cropr_kernels.cli":
            from cropr_command.__main__ import main

            with pytest.raises(Parsed):
                main(words[2:])
            continue
        try:
            module = importlib.import_module(words[1])
        except ImportError:  # an extra
            continue
        monkeypatch.setattr(sys, "argv", words[1:])
        with pytest.raises(Parsed):
            module.main()
    assert len(modules) == 13  # the step `compiled` is networks again
    paths = {word for call in calls for word in shlex.split(call) if word.startswith("tests/")}
    assert paths and all((ROOT / path).exists() for path in paths)


# In one process, which imports the tests once
COLLECT = """
import shlex, sys, pytest
for selection in sys.argv[1:]:
    code = pytest.main([*shlex.split(selection), "--collect-only"])
    if code:
        sys.exit(f"{code!r}: {selection}")
"""


def test_every_selection_of_tests_is_not_empty(tree):
    code, printed, calls = run(tree, "tests", "stress", "sanitize", "models")
    assert code == 0, printed
    # After the number of the share
    selections = {call.partition("-m pytest ")[2] for call in calls if "pytest" in call}
    collected = subprocess.run(
        [sys.executable, "-c", COLLECT, *selections], capture_output=True, text=True, cwd=ROOT
    )
    assert collected.returncode == 0, collected.stdout


def test_a_call_ends_in_time_and_the_next_one_goes_on(tree):
    code, printed, calls = run(tree, LIMIT="900", SLOW="prune_gpu")
    assert code == 3
    assert "ops: ran out of time" in printed and "kernels: no time left in this call" in printed
    assert "prune_gpu" in calls[-1]
    code, printed, calls = run(tree)
    assert code == 0, printed
    assert begun(printed)[0] == "ops" and "prune_gpu" in calls[0]
    assert begun(run(tree)[1]) == ["demo"] * ("not installed" in printed) + [
        "accuracy",
        "camvid",
        "bccd",
        "coco128",
    ]
    assert begun(run(tree, "smoke")[1]) == ["smoke"]  # asked for, it runs again


def test_a_step_that_fails_fails_the_call_and_runs_again(tree):
    code, printed, _ = run(tree, "smoke", "kernels", FAIL="doctor")
    assert (
        code == 1
        and "smoke: failed with exit code 4" in printed
        and begun(printed)[-1] == "kernels"
    )
    assert not (tree / "out/gpu/done/smoke").exists() and (tree / "out/gpu/done/kernels").exists()
    code, printed, _ = run(tree, "tests", FAIL="pytest")
    assert code == 1 and "tests: failed with exit code 4" in printed


def test_an_unknown_step_fails_before_any_step_runs(tree):
    code, printed, calls = run(tree, "smoke", "nonsense")
    assert code == 2 and "unknown step: nonsense" in printed and not calls


def test_results_are_copied_and_packed_into_few_files(tree):
    out = tree / "back"
    code, printed, _ = run(tree, "ops", "training", OUT="back", FAIL="training_step")
    assert code == 1, printed
    assert (tree / "benchmarks/results/gpu_ops.json").exists()
    assert sorted(path.name for path in out.iterdir()) == ["logs.tar.gz", "results.tar.gz"]
    with tarfile.open(out / "results.tar.gz") as packed:
        assert packed.getnames() == ["./gpu_ops.json"]
    with tarfile.open(out / "logs.tar.gz") as packed:
        assert {"./build.log", "./ops.log", "./training.log"} <= set(packed.getnames())


def test_the_extension_is_rebuilt_only_after_a_change(tree):
    assert begun(run(tree, "collect")[1]) == ["build", "collect"]
    assert begun(run(tree, "collect")[1]) == ["collect"]
    newer = max(path.stat().st_mtime for path in (tree / "cropr_kernels").glob("_C*")) + 1
    os.utime(tree / "csrc/one.cpp", (newer, newer))
    assert begun(run(tree, "collect")[1]) == ["build", "collect"]
    (tree / "cropr_kernels" / f"_C{SUFFIX}").unlink()
    code, printed, calls = run(tree, "smoke", FAIL="setup.py")
    # Without it nothing runs
    assert code == 1 and "smoke" not in begun(printed) and len(calls) == 1


def test_sanitizers_look_at_our_kernels_outside_of_the_caching_allocator(tree):
    code, printed, _ = run(tree, "sanitize")
    assert code == 0, printed
    lines = (tree / "sanitizer_calls").read_text().splitlines()
    assert [re.search(r"--tool (\w+)", line)[1] for line in lines] == [
        "memcheck",
        "racecheck",
        "synccheck",
        "initcheck",
    ]
    assert all(line.endswith("caching 1") for line in lines)
    [pattern] = {
        shlex.split(line)[shlex.split(line).index("--kernel-name") + 1] for line in lines[:3]
    }
    names = re.findall(
        r"^def (\w+_kernel)\(",
        "\n".join(p.read_text() for p in (ROOT / "cropr_kernels/ops/triton").glob("*.py")),
        re.M,
    )
    assert names and all(re.search(pattern.removeprefix("regex="), name) for name in names)
    assert not re.search(pattern.removeprefix("regex="), "void cub::DeviceScanKernel")
    # Initcheck takes memory of filtered kernels for never written
    assert "kernel-name" not in lines[3]


@pytest.mark.parametrize(
    ("kernel", "fails"), [("scores_kernel+0x90 in scores.py:3", True), ("cub::scan+0x10", False)]
)
def test_reports_of_initcheck_count_if_they_name_our_kernels(tree, kernel, fails):
    report = (
        f"========= Uninitialized __global__ memory read of size 4 bytes\n=========     at {kernel}"
    )
    code, printed, _ = run(tree, "sanitize", REPORT_OF="initcheck", REPORT=report)
    assert (code == 1) == fails, printed
    assert ("sanitize.initcheck: failed" in printed) == fails
    again = run(tree, "sanitize")
    assert again[0] == 0 and len((tree / "sanitizer_calls").read_text().splitlines()) == (
        1 if fails else 4
    )


def test_the_script_passes_shellcheck():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--severity=warning", SCRIPT], check=True)
