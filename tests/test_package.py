"""The package: layers, the wheel, the missing extension, the command."""

import ast
import graphlib
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import setuptools
import torch

import cropr_kernels
from cropr_kernels import ops
from cropr_kernels.cli import __main__ as cli
from cropr_kernels.inference import loading
from cropr_kernels.utils import flops

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cropr_kernels"
# A file imports from its own package and from those to its left.
ORDER = [
    "_C",
    "utils",
    "schedule",
    "ops",
    "models",
    "importance",
    "pruning",
    "calibration",
    "tuning",
    "vlm",
    "exporting",
    "tasks",
    "train",
    "inference",
    "view",
    "cli",
]


def imported(path):
    """Yield the modules of this package that a file imports, as parts of their path."""
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (
                *package[: len(package) - node.level + 1],
                *(node.module.split(".") if node.module else ()),
            )
            for alias in node.names:
                deeper = PACKAGE.joinpath(*base, alias.name)
                yield (
                    (*base, alias.name)
                    if deeper.with_suffix(".py").exists() or deeper.is_dir()
                    else base
                )


def test_files_import_from_their_own_package_and_from_those_to_its_left_without_cycles():
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).with_suffix("").parts
        if name != ("__init__",):
            graph[tuple(part for part in name if part != "__init__")] = set(imported(path))
    for name, others in graph.items():
        for other in others:
            assert ORDER.index(other[0]) <= ORDER.index(name[0]), (
                f"{'.'.join(name)} imports {'.'.join(other)}"
            )
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


# Longer than the limit since lines have at most 100 columns; these may only shrink.
LONG = {
    "models/probing.py": 443,
    "models/vit.py": 418,
    "ops/reference.py": 411,
    "ops/triton/merge.py": 454,
    "train/data.py": 434,
    "train/loop.py": 478,
    "tuning.py": 422,
    "vlm/api.py": 491,
}


def test_no_file_is_longer_than_its_limit():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "csrc").iterdir()]:
        limit = LONG.get(path.relative_to(PACKAGE).as_posix(), 400) if path.suffix == ".py" else 400
        assert len(path.read_text().splitlines()) <= limit, path
    for path in (ROOT / "tests").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 500, path


def test_info_names_every_op_and_its_kernels(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and cropr_kernels.__version__ in text
    for op in ops.NAMES:
        assert re.search(rf"cropr::{op} +CPU \(C\+\+\), CUDA \(Triton\)", text), op


def test_info_of_a_model_names_its_schedule_and_its_engine(capsys):
    assert cli.main(["info", "vit_tiny_patch16_224", "--rate", "8", "--llf", "--no-merge"]) == 0
    text = capsys.readouterr().out
    assert re.search(
        r"kept after each block +188 180 172 164 156 148 140 132 124 116, all in the last block",
        text,
    )
    assert re.search(r"engine +zero-copy, every block", text)
    assert re.search(r"tokens +197 of width 192, 1 of them never pruned", text)
    assert "merging" not in text
    assert cli.main(["info", "vit_tiny_patch16_224", "--merge"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"merging +Merge\(candidates=3.0, size_weight=2.0\)", text)
    assert re.search(
        r"log\(size\) in attention +one more dimension of 16-bit heads on CUDA, else an additive "
        r"bias",
        text,
    )
    assert cli.main(["info", "vit_tiny_patch16_224", "--rate", "40"]) == 1
    assert (
        "cropr info: schedule: rate must be at most 17 for 197 tokens and 11 modules"
        in capsys.readouterr().err
    )


def test_info_names_heads_without_room_for_the_size_dimension(capsys, monkeypatch):
    wide = cropr_kernels.create_vit("vit_tiny_patch16_224", embed_dim=256, num_heads=1, depth=3)
    monkeypatch.setattr(loading, "create_model", lambda name, pretrained: wide)
    assert cli.main(["info", "wide", "--merge"]) == 0
    assert (
        "an additive bias: heads of width 256 leave no room for one more dimension"
        in capsys.readouterr().out
    )


def test_info_takes_timm_models_and_names_unsupported_ones(capsys):
    pytest.importorskip("timm", reason="timm is not installed")
    assert cli.main(["info", "eva02_tiny_patch14_224"]) == 0
    assert cli.main(["info", "vit_small_patch16_rope_224", "--rate", "4"]) == 0
    capsys.readouterr()
    assert cli.main(["info", "resnet18"]) == 1
    assert (
        "ResNet cannot be pruned: BasicBlock takes maps of four dimensions, as for windows, and"
        in capsys.readouterr().err
    )
    assert cli.main(["info", "vit_base_patch16_224_in21k_nonsense"]) == 1
    assert (
        "a model must be a preset of cropr_kernels, a model of timm or torchvision"
        in capsys.readouterr().err
    )


def test_the_command_without_arguments_prints_its_usage(capsys):
    with pytest.raises(SystemExit):
        cli.main([])
    assert "usage: cropr" in capsys.readouterr().err


@pytest.mark.slow
def test_wheel_works_away_from_the_source_tree(tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-build-isolation",
            "--no-deps",
            "-w",
            tmp_path,
            ROOT,
        ],
        check=True,
        cwd=tmp_path,
    )
    [wheel] = tmp_path.glob("cropr_kernels-*.whl")
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel],
        check=True,
    )
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import torch, cropr_kernels as cropr\n"
        f"assert cropr.__file__.startswith({str(target)!r}), cropr.__file__\n"
        "model = cropr.create_vit('vit_tiny_patch16_224', depth=3)\n"
        "print(cropr.deploy(cropr.apply(model, rate=8))(torch.zeros(1, 3, 224, 224)).shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "torch.Size([1, 1000])" in done.stdout


def test_a_tree_that_is_copied_with_its_build_folder_configures_again(tmp_path, monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    run = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: "-S" in command and run(command, **options)
    )

    def configure(tree):
        """Configure as setup.py does, without building; return the lines of the cache of CMake."""
        make = runpy.run_path(str(tree / "setup.py"))["CMakeBuild"]
        extension = setuptools.Extension("cropr_kernels._C", [])
        command = make(setuptools.Distribution({"ext_modules": [extension]}))
        command.build_temp, command.build_lib = (
            str(tree / "build" / "temp"),
            str(tree / "build" / "lib"),
        )
        command.ensure_finalized()
        command.build_extension(extension)
        return (tree / "build" / "temp" / "CMakeCache.txt").read_text().splitlines()

    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    for name in ("setup.py", "CMakeLists.txt"):
        shutil.copy(ROOT / name, first)
    shutil.copytree(ROOT / "csrc", first / "csrc")
    configure(first)
    (first / "build" / "temp" / "kept").touch()
    configure(first)
    assert (first / "build" / "temp" / "kept").exists()
    shutil.copytree(first, second)
    cache = configure(second)
    assert (
        f"CMAKE_HOME_DIRECTORY:INTERNAL={second}" in cache
        and not (second / "build" / "temp" / "kept").exists()
    )
    gone = "\n".join(cache).replace(f"={ninja_of(cache)}\n", "=/gone/ninja\n")
    (second / "build" / "temp" / "CMakeCache.txt").write_text(gone)
    assert ninja_of(configure(second)) == ninja_of(cache)


def ninja_of(cache):
    [path] = [
        line.partition("=")[2] for line in cache if line.startswith("CMAKE_MAKE_PROGRAM:FILEPATH=")
    ]
    return path


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has a GIL")
def test_the_extension_does_not_switch_the_gil_on():
    code = "import torch, cropr_kernels"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "cropr_kernels._C" not in done.stderr  # Python warns of the first module that needs it


def test_missing_extension_names_the_command_that_builds_it():
    code = "import sys; sys.modules['cropr_kernels._C'] = None; import cropr_kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "ImportError: cropr_kernels: the C++ extension cropr_kernels._C is missing" in last
    assert "pip install --no-build-isolation ." in last


@pytest.mark.parametrize("masked", [False, True])
def test_flops_of_attention_on_the_cpu_are_counted(masked):
    q = torch.randn(2, 3, 50, 16)
    mask = torch.zeros(2, 1, 1, 50) if masked else None
    with torch.no_grad(), flops.flop_counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    assert counter.get_total_flops() == 2 * 2 * 2 * 3 * 50 * 50 * 16
