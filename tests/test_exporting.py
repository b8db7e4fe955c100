"""Exported models: the plain PyTorch form of the ops, every format against the model, fresh
processes, C++."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.cases import SHAPES
from helpers.models import BLOCK_RUNNERS, MODELS, randomize, reference_vit
from helpers.shared import written_once

import cropr_kernels as cropr
from cropr_kernels import exporting, ops
from cropr_kernels.cli import __main__ as cli
from cropr_kernels.ops import decompositions
from cropr_kernels.pruning import portable, strategies
from cropr_kernels.pruning.merging import checkerboard
from cropr_kernels.utils.tensorrt import unsupported_nodes

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore")  # exporters warn of their own deprecations


@pytest.fixture(autouse=True)
def _needs_onnx():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed")


def pruned(name="reference", **options):
    torch.manual_seed(0)
    return cropr.apply(randomize(MODELS[name]()).eval(), num_outputs=0, **options)


def ordered(reduction):
    """Return what a reduction keeps and prunes by position: exported files keep no order."""
    kept_order, pruned_order = reduction.kept_idx.argsort(1), reduction.pruned_idx.argsort(1)
    kept, kept_idx = reduction.kept, reduction.kept_idx
    values = [
        kept.gather(1, kept_order.unsqueeze(2).expand_as(kept)),
        kept_idx.gather(1, kept_order),
        reduction.pruned_idx.gather(1, pruned_order),
    ]
    for rows in (reduction.pruned, reduction.offset):
        if rows is not None:
            values.append(rows.gather(1, pruned_order.unsqueeze(2).expand_as(rows)))
    if reduction.parent_idx is not None:
        values.append(reduction.parent_idx.gather(1, pruned_order))
    return values


@pytest.mark.parametrize("max_top", [3840, 0])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[3] < shape[1]])
def test_standard_operators_drop_like_the_ops(shape, max_top, monkeypatch):
    monkeypatch.setattr(portable, "MAX_TOP", max_top)
    batch, n, dim, num_keep, prefix = shape
    x, module = torch.randn(batch, n, dim), cropr.Cropr(dim)
    tracks_parents = prefix < num_keep and max_top > 0
    forms = [
        form(prefix, (None, None), tracks_parents)
        for form in (portable.PortableDrop, strategies.DropStrategy)
    ]
    got, expected = [form.reduce(module, x, None, num_keep, None, True) for form in forms]
    for a, b in zip(ordered(got), ordered(expected), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tracks_parents", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_standard_operators_merge_like_the_ops(prefix, tracks_parents):
    x = torch.randn(3, 40, 16)
    cells = checkerboard(x, (1, 40 - prefix), prefix)
    arguments = cropr.Merge(), prefix, cells, tracks_parents
    forms = [portable.PortableMerge(*arguments), strategies.MergeStrategy(*arguments)]
    tokens, positions = [x, x], [None, None]
    for num_keep in (33, 27, 21, 13):
        module = cropr.Cropr(16)
        got, expected = [
            form.reduce(module, *inputs, num_keep, None, True)
            for form, inputs in zip(forms, zip(tokens, positions))
        ]
        for a, b in zip(ordered(got), ordered(expected)):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(forms[0].log_sizes(), forms[1].log_sizes())
        assert torch.equal(forms[0].row_idx, forms[1].row_idx)
        tokens, positions = zip(*((part.kept, part.kept_idx) for part in (got, expected)))


def test_standard_operators_restore_and_add_parents_like_the_ops():
    x, order = torch.randn(2, 9, 4), torch.randperm(9).repeat(2, 1)
    kept, pruned = x[:, order[0]].split([6, 3], 1)
    kept_idx, pruned_idx = order.split([6, 3], 1)
    assert torch.equal(decompositions.restore(kept, kept_idx, pruned, pruned_idx), x)
    parent = (torch.arange(9) // 2).repeat(2, 1)
    torch.testing.assert_close(decompositions.add_parents(x, parent), ops.add_parents(x, parent))


CASES = [
    ("reference", {"llf": "track_parent", "merge": True}),
    ("timm EVA-02", {"llf": True}),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            ("reference", {}),
            ("reference, registers", {"llf": True}),
            ("timm EVA-02", {"llf": "track_parent"}),
            ("reference", {"merge": True}),
            ("reference", {"merge": cropr.Merge(candidates=2.0)}),
            ("timm ViT, no class token", {}),
            ("timm EVA-02", {"merge": True}),
        ]
    ),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_onnx_gives_the_same_logits_and_drops_the_same_patches(name, options, tmp_path):
    import onnx

    model = pruned(name, rate=9, **options)
    done = cropr.export(
        model, torch.randn(2, 3, 64, 64), tmp_path / "model.onnx", with_map=True, dynamic_batch=True
    )
    assert done.ops == "aten" and done.difference < 1e-5 and done.same_map is True
    run = exporting.load_exported(done.path, "onnx")
    for batch in (1, 3):
        images = torch.randn(batch, 3, 64, 64)
        output, left = run(images)
        with torch.no_grad():
            torch.testing.assert_close(output, model(images), rtol=1e-4, atol=1e-5)
        assert torch.equal(left, cropr.pruning_map(model, images))
    graph = onnx.load(done.path).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    constants = {value.name for value in graph.initializer}
    tops = [node for node in graph.node if node.op_type == "TopK"]
    # TensorRT needs a constant count
    assert tops and all(node.input[1] in constants for node in tops)
    assert not any(node.op_type in ("NonZero", "Loop", "If", "Unique") for node in graph.node)


class Attention(torch.nn.Module):
    def __init__(self, options):
        super().__init__()
        self.options = options

    def forward(self, x):
        return F.scaled_dot_product_attention(x[:, :1].expand_as(x), x.sin(), x, **self.options)


@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": torch.randn(2, 1, 1, 7), "scale": 0.4},
        {"attn_mask": torch.rand(7, 7) > 0.3},
        {"is_causal": True},
    ],
    ids=["bias", "mask", "causal"],
)
def test_attention_in_files_is_that_of_torch(options, tmp_path):
    x, path = torch.randn(2, 3, 7, 8), tmp_path / "attention.onnx"
    model = Attention(options)
    exporting._write(torch.export.export(model, (x,)), path, "onnx")
    [output] = exporting.load_exported(path, "onnx")(x)
    torch.testing.assert_close(output, model(x))


def test_equal_scores_prune_as_many_patches(tmp_path):
    model = pruned(rate=9, merge=True)
    with torch.no_grad():
        for module in model.cropr:
            module.queries.zero_()  # the runtime decides which
    done = cropr.export(
        model, torch.randn(1, 3, 64, 64), tmp_path / "model.pt2", ops="aten", format="torch"
    )
    assert done.difference < 1e-3


@pytest.mark.parametrize(
    "name",
    [
        "ViT",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("DINOv2 with registers", "torchvision")
        ),
    ],
)
def test_models_that_run_their_blocks_become_onnx_with_all_their_outputs(name, tmp_path):
    model = cropr.apply(randomize(BLOCK_RUNNERS[name]()).eval(), rate=9, llf=True, num_outputs=0)
    done = cropr.export(model, torch.randn(2, 3, 64, 64), tmp_path / "model.onnx", with_map=True)
    assert done.difference < 1e-4 and done.same_map is True


FRESH = """
import sys, torch, torch._inductor.codecache
{imports}
images, expected = torch.load({sample!r})
for path in {programs!r}:
    got = torch.export.load(path).module()(images)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
for path in {packages!r}:
    got = torch._inductor.aoti_load_package(path)(images)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
print("cropr_kernels" in sys.modules)
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Return a folder: one model in both formats and op sets, a preprocessed photo, and its
    logits."""
    pytest.importorskip("PIL.Image", reason="pillow is not installed")
    return written_once(tmp_path_factory, "packages", write_packages)


def write_packages(folder):
    from PIL import Image

    photo = ROOT / "examples" / "photos" / "china.jpg"
    Image.open(photo).save(folder / "photo.ppm")
    pixels = cropr.Pixels((64, 64), (0.5,) * 3, (0.5,) * 3)
    model, images = pruned(rate=9, llf=True), pixels.normalize(pixels.load(photo))[None]
    for file_format in ("torch", "aoti"):
        for op_set in ("cropr", "aten"):
            done = cropr.export(
                model,
                images,
                folder / f"{file_format}_{op_set}.pt2",
                format=file_format,
                ops=op_set,
            )
            assert done.difference < 1e-5
    with torch.no_grad():
        torch.save((images, model(images)), folder / "sample.pt")


@pytest.mark.slow
@pytest.mark.parametrize("op_set", ["cropr", "aten"])
def test_programs_and_packages_run_in_a_fresh_process(packages, op_set):
    code = FRESH.format(
        imports="import cropr_kernels" if op_set == "cropr" else "",
        sample=str(packages / "sample.pt"),
        programs=[str(packages / f"torch_{op_set}.pt2")],
        packages=[str(packages / f"aoti_{op_set}.pt2")],
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(op_set == "cropr")


STRIDED = """
import sys, torch, torch._inductor.codecache
import cropr_kernels
images, expected = torch.load({sample!r})
call = torch._inductor.aoti_load_package({package!r})
torch.testing.assert_close(call(images)[0], expected, rtol=1e-4, atol=1e-5)
for other in (images.to(memory_format=torch.channels_last), images[:, :1].expand(-1, 3, -1, -1)):
    try:
        call(other)
    except RuntimeError:
        print("refused")
    assert call(other.contiguous())[0].isfinite().all()
"""


@pytest.mark.slow
@pytest.mark.parametrize("op_set", ["cropr", "aten"])
def test_packages_that_check_their_inputs_refuse_other_strides(packages, op_set):
    code = STRIDED.format(
        sample=str(packages / "sample.pt"), package=str(packages / f"aoti_{op_set}.pt2")
    )
    environment = {**os.environ, "AOTI_RUNTIME_CHECK_INPUTS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0 and done.stdout.split() == ["refused"] * 2, done.stderr


@pytest.mark.slow
def test_a_program_in_cpp_runs_the_package(packages, tmp_path):
    library = ops.cpp_library()
    assert library is not None
    configure = ["cmake", "-G", "Ninja", "-S", ROOT / "examples" / "cpp", "-B", tmp_path]
    options = [f"-DTORCH_DIR={Path(torch.__file__).parent}", f"-DCROPR_LIBRARY={library}"]
    for command in ([*configure, *options], ["cmake", "--build", tmp_path]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    expected = torch.load(packages / "sample.pt")[1][0]
    functional = pytest.importorskip(
        "torchvision.transforms.functional", reason="torchvision is not installed"
    )
    # Pixels resized by PyTorch differ from Pillow's by up to two levels.
    photo = functional.pil_to_tensor(pytest.importorskip("PIL.Image").open(packages / "photo.ppm"))[
        None
    ]
    height, width = (int(size * 73 / min(photo.shape[2:]) + 1e-6) for size in photo.shape[2:])
    small = torch.ops.aten._upsample_bicubic2d_aa(photo, [height, width], False)
    top, left = (round((size - 64) / 2) for size in (height, width))
    image = (small[:, :, top : top + 64, left : left + 64] / 255 - 0.5) / 0.5
    [[resized]] = torch.export.load(packages / "torch_aten.pt2").module()(image)
    for op_set in ("cropr", "aten"):
        arguments = [
            tmp_path / "classify",
            packages / f"aoti_{op_set}.pt2",
            packages / "photo.ppm",
            "64",
        ]
        done = subprocess.run(arguments, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        probabilities = {
            int(c): float(v) for c, v in re.findall(r"class (\d+)  (\S+)", done.stdout)
        }
        assert (
            len(probabilities) == 5
            and list(probabilities) == expected.argsort(descending=True).tolist()
        )
        torch.testing.assert_close(
            torch.tensor([probabilities[c] for c in range(5)]), resized, rtol=1e-4, atol=1e-4
        )
    intact, path = (packages / "photo.ppm").read_bytes(), tmp_path / "photo.ppm"
    for bad, message in (
        (intact[:-1], "bytes of pixels, holds"),
        (b"P5" + intact[2:], "must be a binary PPM"),
    ):
        path.write_bytes(bad)
        done = subprocess.run(
            [tmp_path / "classify", arguments[1], path, "64"], capture_output=True, text=True
        )
        assert done.returncode == 1 and message in done.stderr
    path.write_bytes(intact.replace(b"P6\n", b"P6\n# a comment, as some tools write one\n", 1))
    done = subprocess.run(
        [tmp_path / "classify", arguments[1], path, "64"], capture_output=True, text=True
    )
    assert done.returncode == 0 and set(re.findall(r"class (\d+)", done.stdout)) == set("01234")


def test_files_are_made_for_contiguous_images_whatever_the_example(tmp_path):
    example = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    cropr.export(pruned(rate=9), example, tmp_path / "model.pt2", format="torch")
    (images,), _ = torch.export.load(tmp_path / "model.pt2").example_inputs
    assert images.is_contiguous() and torch.equal(images, example)


@pytest.mark.parametrize(
    ("change", "difference"), [(lambda y: y * 1.01, "0.01"), (lambda y: y[:, 1:], "inf")]
)
def test_a_file_with_other_outputs_is_deleted(change, difference, tmp_path, monkeypatch):
    model, images, path = pruned(rate=9), torch.randn(1, 3, 64, 64), tmp_path / "model.pt2"
    load = exporting.load_exported
    monkeypatch.setattr(
        exporting, "load_exported", lambda *args: lambda x: [change(y) for y in load(*args)(x)]
    )
    with pytest.raises(
        RuntimeError,
        match=rf"model.pt2 computes something else .* differ by {difference} .*; it was not kept",
    ):
        cropr.export(model, images, path, format="torch")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("merge", [pytest.param(False, marks=pytest.mark.slow), True])
def test_openvino_gives_the_same_logits_and_prunes_the_same_patches(merge, tmp_path):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    model, images = pruned(rate=9, merge=merge), torch.randn(2, 3, 64, 64)
    path = tmp_path / "model.xml"
    done = cropr.export(model, images, path, format="openvino", with_map=True, dynamic_batch=True)
    assert done.difference < 1e-5 and done.same_map is True
    assert {file.name for file in tmp_path.iterdir()} == {"model.xml", "model.bin"}
    larger = torch.cat([images, images.flip(0)])
    torch.testing.assert_close(
        exporting.load_exported(path, "openvino")(larger)[0], model(larger), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(RuntimeError, match="shape"):  # height and width are those of the example
        exporting.load_exported(path, "openvino")(torch.randn(2, 3, 96, 96))
    converted = openvino.convert_model(cropr.deploy(model), example_input=images)
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    [output] = openvino.compile_model(converted, "CPU", options)(images.numpy()).values()
    torch.testing.assert_close(torch.from_numpy(output), model(images), rtol=1e-4, atol=1e-4)


def test_files_refuse_masks():
    model = pruned(rate=9).requires_grad_(False)
    protect = torch.zeros(1, 8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="exported files take no masks: leave out protect"):
        torch.jit.trace(lambda x: model(x, protect=protect), torch.randn(1, 3, 64, 64))


def graph_of(tmp_path, **options):
    import onnx

    path = tmp_path / "model.onnx"
    cropr.export(pruned(**options), torch.randn(1, 3, 64, 64), path)
    return path, onnx.load(path)


@pytest.mark.parametrize("merge", [False, True])
def test_a_layer_is_one_or_two_topk_without_sorts_and_tensorrt_takes_it(merge, tmp_path):
    path, model = graph_of(tmp_path, rate=9, merge=merge)
    count = Counter(node.op_type for node in model.graph.node)
    layers = 3
    assert count["TopK"] == (2 if merge else 1) * layers
    excluded = {"Where", "Sort", "IsNaN", "NonZero", "ReduceL2", "ReduceMax", "Loop", "If"}
    assert not (excluded | {"Shape", "Expand", "Tile"}) & set(count)
    assert sum(count.values()) < 40 + 35 * layers + (68 * layers if merge else 0)
    assert unsupported_nodes(path) == []
    quantization = pytest.importorskip("onnxruntime.quantization.shape_inference")
    quantization.quant_pre_process(path, tmp_path / "prepared.onnx")


def test_the_check_for_tensorrt_names_what_it_refuses(tmp_path):
    import onnx

    path, model = graph_of(tmp_path, rate=9)
    top = next(node for node in model.graph.node if node.op_type == "TopK")
    count = next(value for value in model.graph.initializer if value.name == top.input[1])
    count.CopyFrom(onnx.numpy_helper.from_array(np.array([4079]), count.name))
    next(field for field in top.attribute if field.name == "sorted").i = 0
    for dtype, values in (("DOUBLE", [0.5]), ("INT64", [1])):
        tensor = onnx.helper.make_tensor(dtype, getattr(onnx.TensorProto, dtype), [1], values)
        model.graph.initializer.append(tensor)
    for index, (kind, *inputs) in enumerate(
        [("Unique", top.input[0]), ("Abs", "DOUBLE"), ("CumSum", "INT64", top.input[0])]
    ):
        model.graph.node.append(onnx.helper.make_node(kind, inputs, [f"other {index}"]))
    model.opset_import[0].version = 8
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    assert unsupported_nodes(path) == [
        "opset 8 is not in [9, 20]",
        "operators of domain com.microsoft are not standard ones",
        "TopK takes at most 3840 elements, got 4079",
        "TopK must be sorted",
        "operator Unique is not supported, or of dynamic shape",
        "Abs computes in float64, which becomes float32",
        "CumSum takes floats, got INT64",
        "CumSum needs a constant input 1",
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("merge", [False, True])
def test_packages_compiled_for_cuda_use_standard_operators_only(merge, tmp_path):
    model, images = pruned(rate=9, merge=merge).cuda(), torch.randn(2, 3, 64, 64, device="cuda")
    done = cropr.export(model, images, tmp_path / "model.pt2", format="aoti", with_map=True)
    assert done.ops == "aten" and done.same_map is True


def test_export_does_not_change_the_model(tmp_path):
    model, images = pruned(rate=9).train(), torch.randn(1, 3, 64, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cropr.export(model, images, tmp_path / "model.pt2", format="torch")
    assert model.training and all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items()
    )


def test_illegal_formats_models_and_missing_libraries_raise(tmp_path, monkeypatch):
    model, images = pruned(rate=9), torch.randn(1, 3, 64, 64)
    with pytest.raises(TypeError, match=r"cropr.export: the model is not pruned"):
        cropr.export(reference_vit(), images, tmp_path / "a.onnx")
    with pytest.raises(
        ValueError,
        match="one of torch, aoti, onnx, openvino and ops cropr or aten, got 'tflite'",
    ):
        cropr.export(model, images, tmp_path / "a.onnx", format="tflite")
    with pytest.raises(ValueError, match=r"a file of format onnx must end in .onnx, got a.pt2"):
        cropr.export(model, images, tmp_path / "a.pt2")
    with pytest.raises(ValueError, match="onnx has none of the cropr ops"):
        cropr.export(model, images, tmp_path / "a.onnx", ops="cropr")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ImportError,
        match=r"onnx needs onnxruntime: pip install onnxruntime \(or the extra \[export\]",
    ):
        cropr.export(model, images, tmp_path / "a.onnx")


def test_the_command_writes_compares_and_times(tmp_path, capsys):
    model = cropr.create_vit("vit_tiny_patch16_224", num_classes=5)
    weights, queries = tmp_path / "tiny.pt", tmp_path / "queries.safetensors"
    torch.save(model.state_dict(), weights)
    assert cli.main(["export", str(weights), "--out", str(tmp_path)]) == 1
    assert "without queries tokens would be pruned at random" in capsys.readouterr().err
    cropr.save_queries(cropr.apply(model, rate=8, num_outputs=0), queries)
    common = ["export", str(weights), "--queries", str(queries), "--rounds", "1"]
    common += ["--out", str(tmp_path / "out")]
    photos = str(ROOT / "examples" / "photos")
    assert cli.main([*common, "--rate", "9", "--format", "onnx", "--map", "--images", photos]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "tiny.onnx").is_file()
    assert printed.count("the same patches are pruned after the same blocks") == 1
    assert re.search(r"tiny.onnx +aten +\d+\.\d +\S+ +\S+ +\S+ +\d\.\d\d +\d+%\n", printed)
