"""A pruned model as a file that runs elsewhere: torch.export, AOTInductor, ONNX; compared with it before it is kept."""

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .ops.decompositions import decompositions
from .pruning.api import deploy
from .pruning.model import require_pruned, run, warn_of_random_queries
from .pruning.state import PruningOptions
from .utils.io import disk_errors, publish
from .utils.optional import import_optional

FORMATS = {"torch": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}  # of the largest output; float64 scores are float32
_COARSE = 5e-2  # in 16 bits a near-tie may send another token away


class Exported(NamedTuple):
    """A file, and how far what it computes is from the model."""

    path: Path
    ops: str  # "cropr", or "aten": needs nothing of this package
    difference: float  # the largest of any output, over the largest output
    same_map: bool | None  # whether the same patches leave behind the same blocks; None without with_map


class _Outputs(nn.Module):
    """The tensors of a model's output, and the pruning map behind them."""

    def __init__(self, model: Any, with_map: bool):
        super().__init__()
        self.model, self.with_map = model, with_map

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        output, state = run(self.model, lambda: self.model.cropr.spec.tower(images), PruningOptions())
        return (*_tensors(output), state.pruning_map(images.device)) if self.with_map else _tensors(output)


def _tensors(output: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


@torch.no_grad()
def export(
    model: Any,
    images: Tensor,
    path: str | Path,
    *,
    format: str = "onnx",
    ops: str | None = None,
    dynamic_batch: bool = False,
    with_map: bool = False,
) -> Exported:
    """Write a pruned model, at the schedule and image size it now has, as a file that runs without it.

    The file is loaded again and compared with the model on `images` before it gets its name: there is never one that
    computes something else.

    Args:
        model: pruned by `apply`; it is read only. Auxiliary heads are left out, queries folded.
        images: (B, C, H, W), an input as the file will get them; the batch size too, unless it is dynamic.
        path: file to write, .pt2 or .onnx.
        format: "onnx"; "torch", a program of torch.export; "aoti", a package that AOTInductor compiled for this kind of
            machine, for `torch._inductor.aoti_load_package` or C++ (examples/cpp).
        ops: "cropr", the ops of this package, which the process that loads the file must have (Python: import
            cropr_kernels; C++: libcropr_ops); or "aten", TopK and gathers alone, which need nothing. Default: "aten"
            for ONNX and on CUDA, else "cropr". Without the ops, which of equal scores stays is up to the runtime.
        dynamic_batch: the file takes batches of any size.
        with_map: also give, as the last output, the pruning map (B, grid height, grid width) int64: how many blocks
            each patch went through.

    Raises:
        TypeError: the model is not pruned.
        ValueError: the format or ops are unknown, or do not go together.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        RuntimeError: the file computes something else than the model; it is not kept.
    """
    require_pruned(model, "cropr.export")
    path = Path(path)
    if format not in FORMATS or ops not in (None, "cropr", "aten"):
        known = f"format must be one of {', '.join(FORMATS)} and ops cropr or aten"
        raise ValueError(f"cropr.export: {known}, got {format!r}, {ops!r}")
    if path.suffix != FORMATS[format]:
        raise ValueError(f"cropr.export: a file of format {format} must end in {FORMATS[format]}, got {path.name}")
    if ops is None:
        ops = "aten" if format == "onnx" or (format == "aoti" and images.is_cuda) else "cropr"
    need_libraries(format)
    if format == "onnx" and ops == "cropr":
        raise ValueError("cropr.export: ONNX has none of the cropr ops; use ops='aten'")
    warn_of_random_queries(model, "cropr.export")
    wrapped = _Outputs(deploy(model, engine=False), with_map).eval()
    traced = images.repeat(2, 1, 1, 1) if dynamic_batch and images.shape[0] == 1 else images
    shapes = ({0: torch.export.Dim.DYNAMIC},) if dynamic_batch else None
    program = torch.export.export(wrapped, (traced,), dynamic_shapes=shapes)
    if ops == "aten":
        program = program.run_decompositions(decompositions())
    expected = wrapped(images)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export") as folder, disk_errors(path):
        file = Path(folder) / path.name
        _write(program, file, format)
        difference, same_map = _compare(list(load_exported(file, format)(images)), list(expected), with_map)
        allowed = _TOLERANCE.get(images.dtype, _COARSE)
        if difference > allowed or same_map is False:
            what = ", and other patches leave" if same_map is False else ""
            raise RuntimeError(
                f"cropr.export: {path.name} computes something else than the model: outputs differ by {difference:.2g} "
                f"of the largest, allowed are {allowed:g}{what}; it was not kept"
            )
        for part in sorted(Path(folder).iterdir(), key=lambda part: part.name == path.name):  # itself last
            publish(part, path.parent / part.name)
    return Exported(path, ops, difference, same_map)


def need_libraries(format: str) -> None:
    """Raise ImportError where a library that a format needs is not installed."""
    for library in ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ():
        import_optional(library, "export", "cropr.export to ONNX")


def _write(program: Any, file: Path, format: str) -> None:
    if format == "torch":
        torch.export.save(program, file)
    elif format == "aoti":
        torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    else:
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


def load_exported(path: str | Path, format: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A file that `export` wrote, as a function of images; ONNX runs on the CPU or CUDA provider of onnxruntime."""
    if format == "torch":
        return torch.export.load(path).module()
    if format == "aoti":
        importlib.import_module("torch._inductor.codecache")  # torch 2.10 forgets to
        loaded = torch._inductor.aoti_load_package(str(path))
        return lambda images: _tensors(loaded(images))
    onnxruntime = import_optional("onnxruntime", "export", "an ONNX file")
    options = onnxruntime.SessionOptions()
    # Its threads would go on spinning after a call, and slow down whatever the process does next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    there = onnxruntime.get_available_providers()
    providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in there]
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)

    def run(images: Tensor) -> tuple[Tensor, ...]:
        outputs = session.run(None, {"images": images.cpu().numpy()})
        return tuple(torch.from_numpy(output).to(images.device) for output in outputs)

    return run


def _compare(got: list[Tensor], wanted: list[Tensor], with_map: bool) -> tuple[float, bool | None]:
    same_map = torch.equal(got.pop().cpu(), wanted.pop().cpu()) if with_map else None
    if [one.shape for one in got] != [one.shape for one in wanted]:
        return float("inf"), same_map
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(got, wanted) if b.is_floating_point() and b.numel()]
    differences = [((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item() for a, b in pairs]
    return max(differences, default=0.0), same_map
