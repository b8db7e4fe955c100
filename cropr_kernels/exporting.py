"""Export of a pruned model to torch.export, AOTInductor, ONNX and OpenVINO; each file is compared
with the model."""

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from .pruning.deployment import deploy
from .pruning.model import modules_of, require_pruned, run, warn_of_random_queries
from .pruning.state import PruningOptions
from .utils.io import disk_errors, publish
from .utils.optional import import_optional

FORMATS = {"torch": ".pt2", "aoti": ".pt2", "onnx": ".onnx", "openvino": ".xml"}
LIBRARIES = {
    "onnx": ("export", ("onnx", "onnxscript", "onnxruntime")),
    "openvino": ("openvino", ("onnx", "onnxscript", "openvino")),
}
# Of the largest output; float64 scores are float32
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
_TOLERANCE_16_BIT = 5e-2  # a near-tie may prune another token


class Exported(NamedTuple):
    """An exported file, and its difference from the model."""

    path: Path
    ops: str  # "cropr", or "aten": independent of this package
    difference: float  # the largest of any output, over the largest output
    # The same patches are pruned after the same blocks; None without with_map
    same_map: bool | None


class _Outputs(nn.Module):
    """The tensors of a model's output, and the pruning map after them."""

    def __init__(self, model: nn.Module, with_map: bool, portable: bool):
        super().__init__()
        self.model = model
        self.with_map = with_map
        self.portable = portable

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        spec = modules_of(self.model).spec
        options = PruningOptions(full=spec.returns_tokens, portable=self.portable)
        output, state = run(self.model, lambda: spec.run(images), options)
        return (
            (*_tensors(output), state.pruning_map(images.device))
            if self.with_map
            else _tensors(output)
        )


def _tensors(output: object) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


@torch.no_grad()
def export(
    model: nn.Module,
    images: Tensor,
    path: str | Path,
    *,
    format: str = "onnx",
    ops: str | None = None,
    dynamic_batch: bool = False,
    with_map: bool = False,
) -> Exported:
    """Write a pruned model, at its present schedule and image size, as a file that runs without it.

    The file is loaded again and compared with the model on `images` before it gets its name, so
    that no file computes something else.

    Args:
        model: pruned by `apply`; it is read only. Auxiliary heads are left out, queries folded.
        images: (B, C, H, W), an example input; its batch size is fixed unless dynamic_batch.
        path: file to write, .pt2, .onnx or .xml.
        format: "onnx"; "torch", a program of torch.export; "aoti", a package that AOTInductor
            compiled for this kind of machine, for `torch._inductor.aoti_load_package` or C++
            (examples/cpp); "openvino", an .xml file with its weights beside it, .bin.
        ops: "cropr", the ops of this package, which the process that loads the file must have
            (Python: import cropr_kernels; C++: libcropr_ops); or "aten", TopK and gathers alone,
            which need nothing. Default: "aten" for ONNX, OpenVINO and on CUDA, else "cropr".
            Without the ops, the runtime decides between equal scores.
        dynamic_batch: the file takes batches of any size.
        with_map: add, as the last output, the pruning map (B, grid height, grid width) int64: the
            number of blocks that each patch went through.

    Raises:
        TypeError: the model is not pruned.
        ValueError: the format or ops are unknown, or do not go together.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        RuntimeError: the file computes something else than the model; it is not kept.
    """
    require_pruned(model, "cropr.export")
    path = Path(path)
    if format not in FORMATS or ops not in (None, "cropr", "aten"):
        raise ValueError(
            f"cropr.export: format must be one of {', '.join(FORMATS)} and ops cropr or aten, got "
            f"{format!r}, {ops!r}"
        )
    if path.suffix != FORMATS[format]:
        raise ValueError(
            f"cropr.export: a file of format {format} must end in {FORMATS[format]}, got "
            f"{path.name}"
        )
    if ops is None:
        ops = "aten" if format in LIBRARIES or (format == "aoti" and images.is_cuda) else "cropr"
    need_libraries(format)
    if format in LIBRARIES and ops == "cropr":
        raise ValueError(f"cropr.export: {format} has none of the cropr ops; use ops='aten'")
    warn_of_random_queries(model, "cropr.export")
    wrapped = _Outputs(deploy(model, engine=False), with_map, ops == "aten").eval()
    images = images.contiguous()  # AOTInductor compiles for these strides
    example = images.repeat(2, 1, 1, 1) if dynamic_batch and images.shape[0] == 1 else images
    dynamic_shapes = ({0: torch.export.Dim.DYNAMIC},) if dynamic_batch else None
    program = torch.export.export(wrapped, (example,), dynamic_shapes=dynamic_shapes)
    expected = wrapped(images)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".export") as folder,
        disk_errors(path),
    ):
        file = Path(folder) / path.name
        _write(program, file, format)
        difference, same_map = _compare(
            list(load_exported(file, format)(images)), list(expected), with_map
        )
        tolerance = _TOLERANCE.get(images.dtype, _TOLERANCE_16_BIT)
        if difference > tolerance or same_map is False:
            patches = ", and other patches are pruned" if same_map is False else ""
            raise RuntimeError(
                f"cropr.export: {path.name} computes something else than the model: outputs "
                f"differ by {difference:.2g} "
                f"of the largest, allowed are {tolerance:g}{patches}; it was not kept"
            )
        # Itself last
        for written in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            publish(written, path.parent / written.name)
    return Exported(path, ops, difference, same_map)


def need_libraries(format: str) -> None:
    """Raise ImportError if a library that a format needs is not installed."""
    extra, libraries = LIBRARIES.get(format, ("", ()))
    for library in libraries:
        import_optional(library, extra, f"cropr.export to {format}")


def _write(program: ExportedProgram, file: Path, format: str) -> None:
    if format == "torch":
        torch.export.save(program, file)
    elif format == "aoti":
        torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    elif format == "openvino":
        openvino = import_optional("openvino", "openvino", "an OpenVINO file")
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            onnx_file = Path(folder) / "model.onnx"
            _write(program, onnx_file, "onnx")
            openvino.save_model(openvino.convert_model(onnx_file), file, compress_to_fp16=False)
    else:
        attention = torch.ops.aten.scaled_dot_product_attention.default
        program = program.run_decompositions({attention: _attention})
        size = sum(value.numel() * value.element_size() for value in program.state_dict.values())
        names = [f"output_{i}" for i in range(len(program.graph_signature.user_outputs))]
        torch.onnx.export(
            program,
            f=file,
            input_names=["images"],
            output_names=["output", *names[1:]],
            external_data=size > 1_500_000_000,  # a file of protocol buffers ends at 2 GB
            verbose=False,
        )


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute attention in few nodes, which runtimes fuse: torch's exporter moves the keys twice.

    NotImplemented leaves other kinds to the exporter.
    """
    is_plain = not (dropout_p or is_causal or enable_gqa)
    if not is_plain or (attn_mask is not None and attn_mask.dtype == torch.bool):
        return NotImplemented
    logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    return (logits if attn_mask is None else logits + attn_mask).softmax(-1) @ v


def load_exported(path: str | Path, format: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Load a file of `export` as a function of images.

    ONNX runs on the CPU or CUDA provider of onnxruntime, OpenVINO on the CPU in float32: its
    default, bfloat16 where the CPU has it, rounds other scores to equal ones.
    """
    if format == "torch":
        return torch.export.load(path).module()
    if format == "aoti":
        importlib.import_module("torch._inductor.codecache")  # torch 2.10 does not
        loaded = torch._inductor.aoti_load_package(str(path))
        return lambda images: _tensors(loaded(images))
    if format == "openvino":
        openvino = import_optional("openvino", "openvino", "an OpenVINO file")
        compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def infer(images: Tensor) -> tuple[Tensor, ...]:
            outputs = compiled(images.cpu().numpy())
            return tuple(torch.from_numpy(outputs[i].copy()) for i in range(len(outputs)))

        return infer
    onnxruntime = import_optional("onnxruntime", "export", "an ONNX file")
    options = onnxruntime.SessionOptions()
    # Its threads spin within a call, between small nodes, and not after it
    options.add_session_config_entry("session.force_spinning_stop", "1")
    available = onnxruntime.get_available_providers()
    providers = [
        name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available
    ]
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)

    def run(images: Tensor) -> tuple[Tensor, ...]:
        outputs = session.run(None, {"images": images.cpu().numpy()})
        return tuple(torch.from_numpy(output).to(images.device) for output in outputs)

    return run


def _compare(
    outputs: list[Tensor], expected: list[Tensor], with_map: bool
) -> tuple[float, bool | None]:
    """Return the largest relative difference, and whether the maps, the last outputs, are equal."""
    same_map = torch.equal(outputs.pop().cpu(), expected.pop().cpu()) if with_map else None
    if [output.shape for output in outputs] != [output.shape for output in expected]:
        return float("inf"), same_map
    differences = [
        _difference(a, b) for a, b in zip(outputs, expected) if b.is_floating_point() and b.numel()
    ]
    return max(differences, default=0.0), same_map


def _difference(output: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value."""
    expected = expected.double().cpu()
    largest = expected.abs().max().clamp_min(1e-12)
    return ((output.double().cpu() - expected).abs().max() / largest).item()
