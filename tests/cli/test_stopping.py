"""Nothing computed is thrown away: commands check first, and stop in order. `cropr X --help` loads
nothing."""

import argparse
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import randomize, reference_vit
from helpers.processes import left_in_session, run_forked

import cropr_kernels as cropr
from cropr_command.__main__ import main
from cropr_command.arguments import FORMATS, make_parser
from cropr_kernels import exporting
from cropr_kernels.models.vit import ViT
from cropr_kernels.train.config import PRESETS

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[2]
PHOTOS = str(ROOT / "examples" / "photos")
COMMANDS = (
    "info",
    "doctor",
    "calibrate",
    "map",
    "view",
    "tune",
    "bench",
    "export",
    "infer",
    "train",
    "eval",
)
TRAIN = (
    "epochs=1",
    "batch_size=2",
    "img_size=64,64",
    "model_options=depth=3,embed_dim=64,num_heads=2",
    "rate=1",
    "workers=1",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Inputs of the commands, by name: a model, queries, photos, classes of photos, a run."""
    torch.manual_seed(0)
    for library in (
        "PIL",
        "matplotlib",
        "pyarrow",
        "safetensors",
        "timm",
        "torchvision",
        "torchmetrics",
    ):
        pytest.importorskip(library, reason=f"{library} is not installed")
    folder = tmp_path_factory.mktemp("inputs")
    model = cropr.apply(randomize(reference_vit()), rate=8, num_outputs=0)
    cropr.save(model, folder / "model")
    cropr.save_queries(model, folder / "queries.safetensors")
    for index, photo in enumerate(sorted(Path(PHOTOS).glob("*.jpg"))[:4]):
        for part in ("train", "val"):
            class_folder = folder / "classes" / part / f"class{index % 2}"
            class_folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(photo, class_folder)
    data = ["--data", str(folder / "classes")]
    assert main(["train", *data, "--out", str(folder / "run"), "--quiet", *TRAIN]) == 0
    (folder / "file").write_text("a file")
    return {
        "M": str(folder / "model"),
        "Q": str(folder / "queries.safetensors"),
        "P": PHOTOS,
        "I": str(folder),
    }


def filled(command, inputs, out):
    """The arguments of a command, with names in place of letters."""
    names = inputs | {"OUT": str(out)}
    return [
        re.sub(r"^(OUT|[MQPI])(?=[/.]|$)", lambda name: names[name[0]], word)
        for word in command.split()
    ]


# Every command that writes, and every rate that it takes; nothing may run before what is wrong is
# said.
WRITES = {
    "calibrate": "calibrate M P --out OUT.safetensors",
    "map": "map M P --queries Q --out OUT",
    "tune": "tune M --speedup 1.5 --out OUT.json",
    "bench": "bench M --out OUT",
    "export": "export M --queries Q --format torch --out OUT",
    "infer": "infer M P --queries Q --out OUT",
    "train": "train --data I/classes --out OUT " + " ".join(TRAIN),
}
RATES = {
    "info": "info M --rate",
    "calibrate": "calibrate M P --out OUT.safetensors --rates 4",
    "map": "map M P --out OUT --rate",
    "bench": "bench M --out OUT --rates 4",
    "export": "export M --queries Q --format torch --out OUT --rate",
    "infer": "infer M P --queries Q --out OUT --rate",
    "eval": "eval I/run --rates 1",
    "train": "train --data I/classes --out OUT model=vit_tiny_patch16_224 img_size=64,64 rate=",
}


@pytest.fixture
def no_forward(monkeypatch):
    def refuse(*_):
        raise AssertionError("the model ran before the arguments were checked")

    monkeypatch.setattr(ViT, "forward", refuse)


@pytest.mark.parametrize("path", ["file/out", "none"])
@pytest.mark.parametrize("command", WRITES)
def test_unwritable_paths_fail_before_the_work(command, path, inputs, no_forward, capsys):
    out = Path("/proc/none/out") if path == "none" else Path(inputs["I"]) / path
    assert main(filled(WRITES[command], inputs, out)) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"cropr {command}: --out ") and printed.endswith(
        ": choose another path\n"
    ), printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("command", RATES)
def test_rates_are_checked_before_the_work(command, inputs, no_forward, tmp_path, capsys):
    words = filled(RATES[command], inputs, tmp_path / "out")
    words = [*words[:-1], words[-1] + "90"] if words[-1].endswith("=") else [*words, "90"]
    assert main(words) == 1
    printed = capsys.readouterr().err
    assert "rate" in printed and "90" in printed and "token" in printed and printed.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_files_with_another_suffix_are_rejected(inputs, no_forward, tmp_path, capsys):
    for command, end in (
        ("calibrate M P --out OUT.pt", ".safetensors"),
        ("tune M --speedup 2 --out OUT.txt", ".json"),
    ):
        assert main(filled(command, inputs, tmp_path / "out")) == 1
        assert f"--out must end in {end}, got {tmp_path / 'out'}" in capsys.readouterr().err
    (tmp_path / "folder.json").mkdir()
    assert main(filled("tune M --speedup 2 --out OUT.json", inputs, tmp_path / "folder")) == 1
    assert "folder.json is a folder: choose a file in it" in capsys.readouterr().err


# Runs a command and sends its group or itself a signal in the nth call of a function, or when a
# module is imported.
STOPPED = """
import importlib, os, sys
from cropr_command.__main__ import main
number, where, count, *arguments = sys.argv[1:]
calls = []
def stop():
    calls.append(where)
    if len(calls) == int(count):
        # A terminal sends SIGINT to the group.
        os.killpg(0, int(number)) if int(number) == 2 else os.kill(os.getpid(), int(number))
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == where:
            stop()
module, _, name = where.rpartition(":")
if module:
    owner = importlib.import_module(module)
    *inner, name = name.split(".")
    for one in inner:
        owner = getattr(owner, one)
    plain = getattr(owner, name)
    def counted(*args, **kwargs):
        stop()
        return plain(*args, **kwargs)
    setattr(owner, name, counted)
else:
    sys.meta_path.insert(0, Finder())
sys.exit(main(arguments))
"""
STOPS = {
    "info": ("info M", "cropr_kernels.cli.info:deployed_copy", 1, "nothing was written", 0),
    "calibrate": (
        WRITES["calibrate"],
        "cropr_kernels.pruning.observing:importance",
        3,
        "starts over",
        0,
    ),
    "calibrate, comparing": (
        WRITES["calibrate"],
        "cropr_kernels.calibration:outputs_of",
        2,
        "starts over",
        1,
    ),
    "map, writing": (
        WRITES["map"],
        "cropr_kernels.utils.io:publish",
        3,
        "named above are complete",
        2,
    ),
    "tune": (WRITES["tune"], "cropr_kernels.utils.timing:seconds_of", 3, "nothing was written", 0),
    "bench, writing": (
        WRITES["bench"] + " --batch 1 2",
        "cropr_kernels.cli.bench:write_text",
        2,
        ".json",
        1,
    ),
    "export": (
        WRITES["export"],
        "cropr_kernels.exporting:_compare",
        1,
        "named above are complete",
        0,
    ),
    "infer": (
        WRITES["infer"] + " --unit 2",
        "cropr_kernels.cli.infer:write_part",
        2,
        "resumes with the missing files",
        2,
    ),
    "infer, writing": (
        WRITES["infer"],
        "cropr_kernels.utils.io:publish",
        2,
        "resumes with the missing files",
        1,
    ),
    "train": (
        WRITES["train"],
        "cropr_kernels.train.loop:Run._step",
        2,
        "resumes from the last checkpoint in",
        2,
    ),
    "train, writing": (
        WRITES["train"],
        "cropr_kernels.train.checkpoint:atomic_write",
        1,
        "last checkpoint in",
        2,
    ),
    "eval": ("eval I/run", "cropr_kernels.train.evaluate:Top.update", 1, "starts over", 0),
}


def left_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("case", STOPS)
def test_a_stopped_command_says_one_sentence_and_leaves_no_temporary_file(
    case, inputs, tmp_path, tmp_path_factory
):
    command, where, count, sentence, files = STOPS[case]
    number = signal.SIGTERM if "writing" in case else signal.SIGINT
    out, scratch = tmp_path / "out", tmp_path_factory.mktemp("t")
    out.mkdir()
    words = filled(command, inputs, out / "x") + (
        ["--quiet"] if not command.startswith("info") else []
    )
    arguments = [str(int(number)), where, str(count), *words]
    ended = run_forked(STOPPED, arguments, tmp_path / "printed", TMPDIR=str(scratch))
    name = "terminated" if number == signal.SIGTERM else "interrupted"
    assert ended.returncode == 128 + number, ended.stderr
    assert re.fullmatch(rf"cropr {words[0]}: {name}; .*{re.escape(sentence)}.*\n", ended.stderr), (
        ended.stderr
    )
    left = [path for path in left_in(out) if Path(path).name != ".lock"]
    assert len(left) == files and not [path for path in left if Path(path).name.startswith(".")], (
        left
    )
    assert not left_in(scratch)
    assert not left_in_session(ended.pid)


def test_a_command_stopped_during_imports_prints_one_sentence():
    command = [sys.executable, "-c", STOPPED, str(int(signal.SIGINT)), "torch.nn", "1", "info"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, start_new_session=True)
    assert done.returncode == 128 + signal.SIGINT
    assert re.fullmatch(r"cropr info: interrupted; .*nothing was written.*\n", done.stderr), (
        done.stderr
    )


def test_a_closed_pipe_is_no_error(inputs, tmp_path):
    for words in (["info"], filled(WRITES["map"], inputs, tmp_path / "x")):
        command = [sys.executable, "-W", "ignore", "-m", "cropr_kernels.cli", *words]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        ) as running:
            running.stdout.close()
            errors = running.stderr.read()
        assert errors == "" and running.returncode == 128 + signal.SIGPIPE


def test_help_loads_no_library(tmp_path):
    code = (
        "import sys; from cropr_command.__main__ import main\ntry:\n    "
        "main(sys.argv[1:])\nexcept SystemExit:\n    "
    )
    code += (
        "print([m for m in ('torch', 'numpy', 'cropr_kernels', 'timm', 'sympy', 'PIL') if m in "
        "sys.modules])"
    )
    for words in ([], *([command] for command in COMMANDS)):
        done = subprocess.run(
            [sys.executable, "-c", code, *words, "--help"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=True,
        )
        assert "usage: cropr" in done.stdout and done.stdout.splitlines()[-1] == "[]", done.stdout


def test_the_package_loads_no_library_that_it_needs_later():
    heavy = (
        "sympy",
        "torch.distributed.checkpoint",
        "torch._dynamo",
        "timm",
        "transformers",
        "PIL",
        "matplotlib",
    )
    code = (
        "import sys, cropr_kernels.cli.train, cropr_kernels.cli.infer, cropr_kernels.cli.export\n"
    )
    code += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


def test_choices_of_arguments_are_those_of_the_package():
    assert set(FORMATS) == set(exporting.FORMATS)
    [commands] = [
        action
        for action in make_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    assert tuple(commands.choices) == COMMANDS
    [preset] = [action for action in commands.choices["train"]._actions if action.dest == "preset"]
    assert preset.choices == sorted(PRESETS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "train --out x --lr 3",
            "unknown argument '--lr'; options of the configuration must be name=value",
        ),
        (
            "tune x --speedup 2 --round 3 --batchs 4",
            "unknown argument '--batchs'; is --batch meant?",
        ),
        ("bench x y", "unknown argument 'y'"),
    ],
)
def test_unknown_arguments_come_with_a_suggestion(words, message, capsys):
    with pytest.raises(SystemExit):
        main(words.split())
    printed = capsys.readouterr().err
    assert message in printed and f"usage: cropr {words.split()[0]}" in printed


def test_options_come_before_and_after_other_arguments():
    parse = make_parser().parse_args
    assert parse(["train", "rate=8", "--out", "x", "lr=1", "--quiet", "ema=0"]).options == [
        "rate=8",
        "lr=1",
        "ema=0",
    ]
    assert [str(path) for path in parse(["map", "M", "a", "--rate", "8", "b"]).images] == ["a", "b"]
    assert parse(["infer", "--rate", "8", "M", "a", "--out", "x"]).model == "M"
