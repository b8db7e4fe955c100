"""The demo's parts, the pictures, and every snippet of the README."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import cropr_kernels as cropr
from cropr_kernels.utils import viz

ROOT = Path(__file__).parent.parent


@pytest.fixture
def examples():
    for package in ("sklearn", "matplotlib", "PIL", "tqdm"):
        pytest.importorskip(package, reason=f"the demo extra is not installed: {package}")
    from examples import demo, digits, photos

    return demo, digits, photos


@pytest.mark.slow
def test_pruned_digits_are_read_as_well_as_unpruned_ones(examples):
    """A real model, trained end to end: half the tokens, the same digits. Three seeds: benchmarks/accuracy/digits."""
    _, digits, _ = examples
    plain = digits.train(seed=0, rate=0, show=False)
    pruned = digits.train(seed=0, rate=digits.RATE, show=False)
    assert pruned.token_share < 0.55
    assert plain.accuracy > 93
    assert pruned.accuracy > plain.accuracy - 2


def test_demo_writes_its_pictures_and_table(examples, tmp_path, monkeypatch, capsys):
    demo, _, photos = examples
    monkeypatch.setattr(sys, "argv", ["demo.py", "--epochs", "1", "--out", str(tmp_path)])
    plain = photos.compare
    monkeypatch.setattr(photos, "compare", lambda names, images: plain(["vit_tiny_patch16_224"], images[:2], repeats=1))
    demo.main()
    text = capsys.readouterr().out
    for column in ("images/s", "speed-up", "GFLOPs", "FLOP ratio", "pruning"):
        assert column in text
    assert text.count("vit_tiny_patch16_224") == 3
    for name in ("digits.png", "speed.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_demo_refuses_a_missing_weight_file(examples, monkeypatch, capsys):
    demo, *_ = examples
    monkeypatch.setattr(sys, "argv", ["demo.py", "--weights", "nowhere.safetensors"])
    with pytest.raises(SystemExit):
        demo.main()
    assert "--weights: no file at nowhere.safetensors" in capsys.readouterr().err


def test_demo_draws_maps_of_a_local_model(examples, tmp_path, capsys):
    demo, *_ = examples
    model = cropr.create_vit("vit_tiny_patch16_224", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    demo.run_pretrained(tmp_path, torch.device("cpu"), str(tmp_path / "weights.pth"))
    assert "class " in capsys.readouterr().out
    for name in ("photos.png", "merged.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_every_photo_has_a_credit():
    credits = (ROOT / "examples" / "photos" / "CREDITS.md").read_text()
    names = [path.name for path in (ROOT / "examples" / "photos").glob("*.jpg")]
    assert names
    assert all(name in credits for name in names)


def test_pruning_maps_need_one_map_per_image(tmp_path):
    with pytest.raises(ValueError, match="must have one batch size, got 2, 1"):
        viz.save_pruning_maps(tmp_path / "a.png", torch.zeros(2, 1, 8, 8), torch.zeros(1, 2, 2), depth=3)


def test_merge_maps_are_drawn_and_need_one_map_per_image(tmp_path):
    with pytest.raises(ValueError, match="must have one batch size, got 2, 1"):
        viz.save_merge_maps(tmp_path / "a.png", torch.zeros(2, 1, 8, 8), torch.zeros(1, 2, 2, dtype=torch.int64))
    maps = torch.tensor([[[0, 0, 1], [2, 1, 1]]])
    viz.save_merge_maps(tmp_path / "a.png", torch.rand(1, 3, 16, 24), maps, titles=["one"])
    assert (tmp_path / "a.png").stat().st_size > 1_000


def test_without_matplotlib_the_error_names_the_extra(monkeypatch, tmp_path):
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'cropr_kernels\[viz\]'"):
        viz.save_pruning_maps(tmp_path / "a.png", torch.zeros(1, 1, 8, 8), torch.zeros(1, 2, 2), depth=3)


def test_pages_say_what_the_results_say():
    from benchmarks.report.pages import PAGES
    from benchmarks.report.render import render

    for page, sections in PAGES.items():
        text = page.read_text()
        assert render(text, sections) == text, "run python -m benchmarks.report"


def snippets():
    """Python of the README and of every page under docs/."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for number, source in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)):
            yield pytest.param(source, id=f"{page.name}-{number}")


@pytest.mark.parametrize("source", snippets())
def test_snippets_run(source, tmp_path, monkeypatch):
    pytest.importorskip("timm", reason="timm is not installed")
    pytest.importorskip("torchvision", reason="the train extra is not installed")
    pytest.importorskip("transformers", reason="the transformers extra is not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile(source.replace("pretrained=True", "pretrained=False"), "snippet", "exec"), {})  # no internet in tests


def test_the_api_reference_says_what_the_docstrings_say():
    page = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["page"]()
    assert page == (ROOT / "docs" / "api.md").read_text(), "run python docs/make_api.py"
    names = [name for name in vars(cropr) if isinstance(getattr(cropr, name), type) or callable(getattr(cropr, name))]
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
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": ROOT / "examples"}}
    ).execute()
    assert [len(cell.get("outputs", [])) for cell in notebook.cells] == stored
    assert "same patches leave: True" in str(notebook.cells)


def headings(page):
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name} links to {path}"
        assert not anchor or anchor in headings(target), f"{page.name} links to {path}#{anchor}"
