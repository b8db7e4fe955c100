"""Atomic files, optional libraries, text tables, photos, FLOPs."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import torchvision_vit

from cropr_kernels import exporting
from cropr_kernels.utils import images, io, optional
from cropr_kernels.utils.flops import flop_counter

ROOT = Path(__file__).parents[2]
# Files that may catch ImportError: the guard itself, and commands whose picture is optional.
CATCH = {"optional.py", "bench.py", "train.py"}


def test_a_file_is_written_completely_or_stays_unchanged(tmp_path):
    path = tmp_path / "file.txt"
    io.write_text(path, "first")

    def stop_half_way():
        with io.atomic_write(path) as temporary:
            assert temporary.parent == tmp_path and temporary.suffix == ".txt" and temporary != path
            temporary.write_text("half")
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        stop_half_way()
    assert path.read_text() == "first"
    with io.atomic_write(path) as temporary:
        temporary.write_bytes(b"second")
        assert path.read_text() == "first"
    assert path.read_text() == "second" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_read_is_not_taken_for_the_one_that_is_written(tmp_path):
    with pytest.raises(FileNotFoundError) as error, io.atomic_write(tmp_path / "new"):
        (tmp_path / "elsewhere" / "old").read_bytes()
    assert error.value.filename == str(tmp_path / "elsewhere" / "old")
    assert list(tmp_path.iterdir()) == []


def test_an_atomic_write_of_nothing_raises(tmp_path):
    with pytest.raises(FileNotFoundError), io.atomic_write(tmp_path / "file.txt"):
        pass
    assert not any(tmp_path.iterdir())


def test_damaged_tensors_raise(tmp_path):
    path, tensor = tmp_path / "weights.pt", torch.randn(64)
    torch.save({"weight": tensor}, path)
    intact = path.read_bytes()
    start = intact.index(tensor.numpy().tobytes())
    for position in range(start, start + 256, 5):
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 1]) + intact[position + 1 :])
        with pytest.raises(ValueError, match=r"cannot be read: the checksum of .* does not match"):
            io.load_tensors(path)
    path.write_bytes(intact)
    assert torch.equal(io.load_tensors(path)["weight"], tensor)


def test_only_utils_io_renames_files():
    """All other files are written through `atomic_write`."""
    for path in (ROOT / "cropr_kernels").rglob("*.py"):
        if path != Path(io.__file__):
            assert not re.search(
                r"os\.replace|os\.rename|\.rename\(|\.replace\(path\)|fsync", path.read_text()
            ), path


def test_a_missing_library_is_named_with_its_feature_and_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    # Another test may have imported it
    monkeypatch.delitem(sys.modules, "PIL.Image", raising=False)
    message = "a picture needs pillow: pip install pillow (or the extra [viz] of cropr_kernels)"
    with pytest.raises(ImportError, match=re.escape(message)):
        optional.import_optional("PIL.Image", "viz", "a picture")
    assert optional.import_optional("json.decoder", "viz", "nothing").__name__ == "json.decoder"


def test_a_library_that_nobody_may_import_is_not_installed(monkeypatch):
    assert optional.is_installed("torch")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert not optional.is_installed("torch")
    assert not optional.is_installed("no_such_library")


def test_a_missing_dependency_of_a_library_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken_library.py").write_text("import a_library_that_it_needs")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        ImportError, match="broken_library, which needs a_library_that_it_needs: pip install a_lib"
    ):
        optional.import_optional("broken_library", "viz", "a picture")
    (tmp_path / "odd_library.py").write_text("raise ModuleNotFoundError('not on this system')")
    with pytest.raises(ModuleNotFoundError, match=r"^not on this system$"):
        optional.import_optional("odd_library", "viz", "a picture")


def test_every_extra_that_the_code_names_exists_and_installs_the_library():
    extras = extras_of(ROOT / "pyproject.toml")
    calls = []
    for path in (ROOT / "cropr_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "import_optional":
                continue
            if isinstance(node.args[1], ast.Constant):
                calls.append((path, node.args[0], ast.literal_eval(node.args[1])))
    for extra, libraries in exporting.LIBRARIES.values():
        calls += [(exporting.__file__, ast.Constant(library), extra) for library in libraries]
    assert len(calls) > 20
    for path, library, extra in calls:
        assert extra in extras, f"{path} names the extra {extra}"
        if isinstance(library, ast.Constant):
            name = optional.distribution(library.value)
            assert name in extras[extra], f"{path}: the extra {extra} does not install {name}"


def test_optional_libraries_are_imported_through_one_guard():
    for path in (ROOT / "cropr_kernels").rglob("*.py"):
        if path.name not in CATCH and path.parent.name != "ops":  # the C++ extension, Triton
            assert not re.search(r"except (ImportError|ModuleNotFoundError)", path.read_text()), (
                path
            )


def extras_of(path):
    """Return the libraries that each extra installs, with those of the extras that it includes."""
    section = path.read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    bodies = re.findall(r"^(\w+) = \[(.*?)\]$", section, flags=re.MULTILINE | re.DOTALL)
    lists = {name: re.findall(r'"([^"]+)"', body) for name, body in bodies}
    libraries = {
        name: {re.split(r"[><=\[]", item)[0] for item in items} for name, items in lists.items()
    }
    for name, items in lists.items():
        for item in items:
            for other in re.findall(r"cropr_kernels\[(\w+)\]", item):
                libraries[name] |= libraries[other]
    return libraries


def test_tables_are_aligned():
    assert io.table(["name", "x"], [["a", "1.5"], ["bcd", "10"]]).splitlines() == [
        "name    x",
        "a     1.5",
        "bcd    10",
    ]
    assert io.table(["a", "b", "c"], [["x", "yy", "1"]], left_aligned=2).splitlines() == [
        "a  b   c",
        "x  yy  1",
    ]


def test_photos_are_cropped_to_any_size_and_other_files_raise_os_errors(tmp_path, monkeypatch):
    Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    path = tmp_path / "photo.png"
    Image.new("RGB", (50, 80), (255, 0, 51)).save(path)
    for size, shape in ((14, (3, 14, 14)), ((28, 56), (3, 28, 56)), ((112, 28), (3, 112, 28))):
        pixels = images.load_photo(path, size)
        assert pixels.shape == shape and pixels.dtype == torch.float32
        torch.testing.assert_close(pixels.mean((1, 2)), torch.tensor([1.0, 0.0, 0.2]))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(OSError, match="decompression bomb"):
        images.load_photo(path)
    path.write_bytes(b"no picture")
    with pytest.raises(OSError, match="cannot identify image file"):
        images.load_photo(path)


def test_flops_of_torchvision_attention_are_counted():
    model, side = torchvision_vit().eval(), 64 // 8
    tokens, dim, depth = side**2 + 1, 64, 4
    block = 4 * tokens * dim**2 + 2 * tokens**2 * dim + 2 * tokens * dim * 128
    with torch.no_grad(), flop_counter() as counter:
        model(torch.randn(1, 3, 64, 64))
    assert counter.get_total_flops() == 2 * (
        depth * block + (tokens - 1) * dim * 3 * 8 * 8 + dim * 5
    )
    assert torch.backends.mha.get_fastpath_enabled()
