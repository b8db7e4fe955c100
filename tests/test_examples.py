"""The demo, the pictures, and the pages: snippets, commands, tables, links."""

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
import warnings
from pathlib import Path

import pytest
import torch

import cropr_kernels as cropr
from benchmarks.utils.results import load
from cropr_kernels.cli import __main__ as cli
from cropr_kernels.utils import viz

ROOT = Path(__file__).parent.parent
NAMES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md")
PAGES = [*(ROOT / name for name in NAMES), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture
def examples():
    for package in ("sklearn", "matplotlib", "PIL", "huggingface_hub"):
        pytest.importorskip(package, reason=f"the demo extra is not installed: {package}")
    from examples import demo, digits

    return demo, digits


@pytest.mark.slow
def test_pruned_digits_are_read_as_well_as_unpruned_ones(examples):
    """A real model, trained end to end: half the tokens, the same digits. Three seeds:
    benchmarks/accuracy/digits."""
    _, digits = examples
    plain = digits.train(seed=0, rate=0, epochs=12, show=False)
    pruned = digits.train(seed=0, rate=digits.RATE, epochs=12, show=False)
    assert pruned.token_share < 0.55
    assert plain.accuracy > 93
    assert pruned.accuracy > plain.accuracy - 2
    train, _, images, labels = digits.load()
    merged = cropr.calibrate(cropr.apply(plain.model, rate=13, merge=True), train[:256])
    (row,) = cropr.agreement(merged, images, [13])
    assert row.flops > 1.4 and row.agreement > 0.95
    assert digits.accuracy(cropr.deploy(merged), images, labels) > plain.accuracy - 2


def run_demo(demo, monkeypatch, capsys, *arguments):
    """Run the demo with few and short measurements; return its output and the rows of its table."""
    measure = demo.measure

    def quick(model, images, rates, **options):
        return measure(model, images[:2], rates, **{**options, "rounds": 1})

    monkeypatch.setattr(demo, "measure", quick)
    monkeypatch.setattr(demo, "CROPS", 4)
    monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, arguments)])
    demo.main()
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    return text, [line for line in lines if line and (line[0] == "unpruned" or line[0].isdigit())]


def test_without_weights_the_demo_trains_on_digits_and_names_the_option(
    examples, tmp_path, monkeypatch, capsys
):
    demo, digits = examples
    monkeypatch.setattr(demo, "find_weights", lambda: None)
    monkeypatch.setattr(digits, "EPOCHS", 4)
    text, rows = run_demo(demo, monkeypatch, capsys, "--out", tmp_path)
    assert "Pruning is lossy" in text and "--weights FILE" in text and "accuracy, %" in text
    assert [row[0] for row in rows] == ["unpruned", "8", "12", "16"] and rows[0][1] == "100.0"
    accuracies = [float(row[2]) for row in rows]
    assert accuracies[0] > 60 and min(accuracies) > accuracies[0] - 20
    for name in ("pruned.png", "merged.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_demo_measures_a_weight_file_on_photos_it_was_not_calibrated_on(
    examples, tmp_path, monkeypatch, capsys
):
    demo, _ = examples
    model = cropr.create_vit("vit_tiny_patch16_224", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    text, rows = run_demo(
        demo, monkeypatch, capsys, "--weights", tmp_path / "weights.pth", "--out", tmp_path
    )
    assert "No pretrained weights" not in text and "accuracy, %" not in text
    assert [row[0] for row in rows] == ["unpruned", "4", "8", "12"] and rows[0][1] == "100.0"
    assert (tmp_path / "pruned.png").stat().st_size > 10_000 and (
        tmp_path / "merged.png"
    ).stat().st_size > 10_000
    subject = demo.pretrained_subject(str(tmp_path / "weights.pth"))
    assert (
        subject.calibration.shape == subject.images.shape == (4, 3, 224, 224)
        and len(subject.pictures) == 4
    )
    assert {path.stem for path in demo.PHOTOS.glob("*.jpg")} > set(demo.CALIBRATION_PHOTOS)


def test_the_demo_finds_weights_in_timms_cache_and_does_without_internet(
    examples, tmp_path, monkeypatch
):
    demo, _ = examples
    monkeypatch.setattr(demo, "try_to_load_from_cache", lambda *_: "cached.safetensors")
    assert demo.find_weights() == "cached.safetensors"
    monkeypatch.setattr(demo, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(demo, "hf_hub_url", lambda *_: "http://127.0.0.1:9/nowhere")
    assert demo.find_weights() is None


def test_the_demo_names_a_missing_weight_file(examples, monkeypatch, capsys):
    demo, _ = examples
    monkeypatch.setattr(sys, "argv", ["demo.py", "--weights", "nowhere.safetensors"])
    with pytest.raises(SystemExit):
        demo.main()
    assert "--weights: no file at nowhere.safetensors" in capsys.readouterr().err


def test_every_photo_has_a_credit():
    credits = (ROOT / "examples" / "photos" / "CREDITS.md").read_text()
    names = [path.name for path in (ROOT / "examples" / "photos").glob("*.jpg")]
    assert names
    assert all(name in credits for name in names)


def test_pruning_maps_need_one_map_per_image(tmp_path):
    with pytest.raises(ValueError, match="must have one batch size, got 2, 1"):
        viz.save_pruning_maps(
            tmp_path / "a.png", torch.zeros(2, 1, 8, 8), torch.zeros(1, 2, 2), depth=3
        )


def test_merge_maps_are_drawn_and_need_one_map_per_image(tmp_path):
    with pytest.raises(ValueError, match="must have one batch size, got 2, 1"):
        viz.save_merge_maps(
            tmp_path / "a.png", torch.zeros(2, 1, 8, 8), torch.zeros(1, 2, 2, dtype=torch.int64)
        )
    maps = torch.tensor([[[0, 0, 1], [2, 1, 1]]])
    viz.save_merge_maps(tmp_path / "a.png", torch.rand(1, 3, 16, 24), maps, titles=["one"])
    assert (tmp_path / "a.png").stat().st_size > 1_000


def test_without_matplotlib_the_error_names_the_extra(monkeypatch, tmp_path):
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install matplotlib \(or the extra \[viz\]"):
        viz.save_pruning_maps(
            tmp_path / "a.png", torch.zeros(1, 1, 8, 8), torch.zeros(1, 2, 2), depth=3
        )


def test_tables_of_the_pages_are_those_of_the_results():
    from benchmarks.report.pages import PAGES as REPORTED
    from benchmarks.report.pages import csv_files, stored_csv_files
    from benchmarks.report.render import render

    for page in PAGES:
        text, sections = page.read_text(), REPORTED.get(page, {})
        assert set(re.findall(r"<!-- (?!end )(\w+) -->", text)) == set(sections), page.name
        assert render(text, sections) == text, "run python -m benchmarks.report"
    assert csv_files() == stored_csv_files(), "run python -m benchmarks.report"


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1100


def test_the_documentation_is_short_and_its_index_names_every_page():
    pages = sorted((ROOT / "docs").glob("*.md"))
    assert sum(len(page.read_text().split()) for page in pages) <= 20_000
    index = (ROOT / "docs" / "README.md").read_text()
    assert [
        page.name for page in pages if f"({page.name})" not in index and page.name != "README.md"
    ] == []


def test_messages_that_troubleshooting_quotes_are_those_of_the_source():
    quoted = re.findall(
        r"^\| `([^`]+?)(?: \.\.\.)?` \|",
        (ROOT / "docs" / "troubleshooting.md").read_text(),
        flags=re.MULTILINE,
    )
    files = [ROOT / "setup.py", *(ROOT / "cropr_kernels").rglob("*.py")]
    source = "".join(path.read_text() for path in files)
    assert len(quoted) > 5 and [message for message in quoted if message not in source] == []


def test_disk_sizes_on_the_pages_are_those_measured():
    _, rows = load("newcomer")
    measured = {
        "+cpu" in row["installed"]: int(row["disk"].removesuffix("MB")) / 1000 for row in rows
    }
    for name in ("README.md", "Makefile"):
        with_cuda, without = map(float, re.findall(r"([\d.]+) GB", (ROOT / name).read_text()))
        assert (
            0.9 * with_cuda < measured[False] < 1.05 * with_cuda
            and 0.9 * without < measured[True] < 1.05 * without
        )


def snippets():
    """Yield the Python snippets of every page, each with the text block below it: its output."""
    pattern = re.compile(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", flags=re.DOTALL)
    for page in PAGES:
        for number, (source, printed) in enumerate(pattern.findall(page.read_text())):
            yield pytest.param(source, printed, id=f"{page.name}-{number}")


@pytest.mark.parametrize(("source", "printed"), snippets())
def test_snippets_run_and_print_their_text_blocks(source, printed, tmp_path, monkeypatch, capsys):
    pytest.importorskip("timm", reason="timm is not installed")
    pytest.importorskip("torchvision", reason="the train extra is not installed")
    pytest.importorskip("transformers", reason="the transformers extra is not installed")
    monkeypatch.chdir(tmp_path)
    warnings.filterwarnings("error", "cropr.* the queries are random")
    # No internet in tests
    exec(compile(source.replace("pretrained=True", "pretrained=False"), "snippet", "exec"), {})
    shown = [
        line for line in capsys.readouterr().out.splitlines() if not line.startswith("[torch.onnx]")
    ]
    assert shown == printed.splitlines()


class Parsed(Exception):
    """The arguments of a command are parsed."""


def commands():
    """Yield the shell commands of every page, without comments."""
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield pytest.param(words, id=f"{page.name}-{' '.join(words)[:60]}")


@pytest.mark.parametrize("words", commands())
def test_commands_of_the_pages_parse(words, tmp_path, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, arguments):
        parse(parser, arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    if "cropr_kernels.cli" in words:
        words = ["cropr", *words[words.index("cropr_kernels.cli") + 1 :]]
    if words[0] == "cropr":
        with pytest.raises(Parsed):
            cli.main(words[1:])
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]) is not None
    elif words[:2] == ["python", "-c"]:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "examples").symlink_to(ROOT / "examples")
        exec(compile(words[2], "command", "exec"), {})
    else:
        assert words[0] in ("pip", "cmake", "build/cpp/classify")


def test_the_api_reference_is_generated_from_the_docstrings():
    page = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["page"]()
    assert page == (ROOT / "docs" / "api.md").read_text(), "run python docs/make_api.py"
    names = [
        name
        for name in vars(cropr)
        if isinstance(getattr(cropr, name), type) or callable(getattr(cropr, name))
    ]
    assert all(f"### cropr.{name}\n" in page for name in names)


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    monkeypatch.setenv("EPOCHS", "1")
    notebook = nbformat.read(ROOT / "examples" / "cropr.ipynb", 4)
    stored = [len(cell.get("outputs", [])) for cell in notebook.cells]
    nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": ROOT / "examples"}},
    ).execute()
    assert [len(cell.get("outputs", [])) for cell in notebook.cells] == stored
    assert "same patches leave: True" in str(notebook.cells)


def headings(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name} links to {path}"
        assert not anchor or anchor in headings(target), f"{page.name} links to {path}#{anchor}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name
)
def test_files_that_pages_name_exist(page):
    package = ROOT / "cropr_kernels"
    folders = {path.name for path in (*ROOT.iterdir(), *package.iterdir()) if path.is_dir()}
    for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", page.read_text()):
        if path.split("/")[0] in folders:
            assert (ROOT / path).exists() or (package / path).exists(), f"{page.name} names {path}"
