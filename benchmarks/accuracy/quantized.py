"""Quantise exported files in int8, pruned and not, and compare them on photos.

python -m benchmarks.accuracy.quantized --data FOLDER [--photos 100] [--rate 8]
    -> benchmarks/results/quantized.json

FOLDER as in benchmarks/accuracy/data.py. Ways: onnxruntime's dynamic quantisation, its static one
after `quant_pre_process`, and NNCF's on OpenVINO. The agreement of the pruned file is with the
unpruned file that was quantised alike (`agreement_int8`); other agreements and the speed-ups are
over the unpruned float32 file of the same runtime. In float32 stay the products of activations,
which choose tokens, and those of massive outliers.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cropr_kernels as cropr
from benchmarks.accuracy.data import DATA, TRAIN, VAL, load_model, read_photos
from benchmarks.utils.results import RESULTS, Results, environment
from benchmarks.utils.runtimes import onnxruntime_call, openvino_call
from cropr_kernels.utils.timing import time_interleaved

Call = Callable[[Tensor], Tensor]
OUTLIER = 32  # usual activations stay below 8, a massive one of this ViT-Ti reaches 80


class Reader:
    """Calibration photos, as onnxruntime reads them."""

    def __init__(self, images: Tensor):
        self.photos = iter(images.split(1))

    def get_next(self) -> dict[str, Any] | None:
        photo = next(self.photos, None)
        return None if photo is None else {"images": photo.numpy()}


def dynamic(path: Path, images: Tensor) -> Call:
    from onnxruntime.quantization import quantize_dynamic

    out = path.with_name(f"{path.stem}-dynamic.onnx")
    # Conv would become ConvInteger, which is slower than float32
    quantize_dynamic(
        path,
        out,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        nodes_to_exclude=products_of_outliers(path, images),
    )
    return onnxruntime_call(out)


def static(path: Path, images: Tensor) -> Call:
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_name(f"{path.stem}-prepared.onnx")
    out = path.with_name(f"{path.stem}-static.onnx")
    quant_pre_process(path, prepared)
    operators = ["MatMul", "Gemm"]
    quantize_static(
        prepared,
        out,
        Reader(images),
        op_types_to_quantize=operators,
        per_channel=True,
        activation_type=QuantType.QUInt8,  # what onnxruntime advises on x86
        nodes_to_exclude=float_products(prepared, images),
        # Sums of the residual stream stay in float32
        extra_options={"OpTypesToExcludeOutputQuantization": operators},
    )
    return onnxruntime_call(out)


def products_of_weights(path: Path) -> dict[str, str]:
    """MatMul nodes with weights: their names, and the names of their activations."""
    import onnx

    graph = onnx.load(path).graph
    weights = {value.name for value in graph.initializer}
    return {
        node.name: next(name for name in node.input if name not in weights)
        for node in graph.node
        if node.op_type == "MatMul" and weights & set(node.input)
    }


def products_of_activations(path: Path) -> list[str]:
    """Names of the MatMul nodes without weights: attention, similarities, merging."""
    import onnx

    weighted = products_of_weights(path)
    return [
        node.name
        for node in onnx.load(path).graph.node
        if node.op_type == "MatMul" and node.name not in weighted
    ]


def products_of_outliers(path: Path, images: Tensor) -> list[str]:
    """Names of the MatMul nodes with weights whose activations hold massive outliers: in 8 bits
    these would leave a few levels to all other values.

    Outliers exceed `OUTLIER` times the magnitude that one in a thousand exceeds, in any image.
    """
    import onnx
    import onnxruntime

    model = onnx.load(path)
    weighted = products_of_weights(path)
    activations = sorted(set(weighted.values()) - {output.name for output in model.graph.output})
    for name in activations:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    massive = set()
    for image in images[:8].split(1):
        for name, values in zip(activations, session.run(activations, {"images": image.numpy()})):
            magnitudes = np.abs(values)
            if magnitudes.max() > OUTLIER * np.quantile(magnitudes, 0.999):
                massive.add(name)
    return [node for node, name in weighted.items() if name in massive]


def float_products(path: Path, images: Tensor) -> list[str]:
    """Names of the MatMul nodes that stay in float32: those of activations, among which are the
    similarities that choose tokens, and those of outliers."""
    return products_of_activations(path) + products_of_outliers(path, images)


def nncf_int8(path: Path, images: Tensor) -> Call:
    import nncf
    import openvino

    model = openvino.convert_model(path)
    dataset = nncf.Dataset([photo.numpy() for photo in images.split(1)])
    # Not validated: OpenVINO fuses attention, so that its MatMul nodes are gone
    ignored = nncf.IgnoredScope(names=float_products(path, images), validate=False)
    quantized = nncf.quantize(
        model,
        dataset,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(images),
        ignored_scope=ignored,
    )
    out = path.with_name(f"{path.stem}-nncf.xml")
    openvino.save_model(quantized, out)
    return openvino_call(out, "f32")


WAYS: dict[str, tuple[Callable[[Path, Tensor], Call], Callable[[Path], Call]]] = {
    "onnxruntime, dynamic": (dynamic, onnxruntime_call),
    "onnxruntime, static": (static, onnxruntime_call),
    "OpenVINO, NNCF": (nncf_int8, partial(openvino_call, precision="f32")),
}


def classes(call: Call, images: Tensor) -> Tensor:
    """The best class of each image, (B,)."""
    return torch.cat([call(part).argmax(1) for part in images.split(4)])


def agreement(a: Tensor, b: Tensor) -> float:
    """The share of equal classes in %."""
    return round(100 * (a == b).float().mean().item(), 1)


def export_files(data: Path, rate: int, calibration: Tensor, folder: Path) -> dict[str, Path]:
    """Export the pretrained ViT-Ti unpruned, merging and dropping."""
    paths: dict[str, Path] = {}
    for kind in ("unpruned", "merge", "drop"):
        model, _ = load_model(data)
        is_pruned = kind != "unpruned"
        cropr.apply(model, rate=rate if is_pruned else 0, merge=kind == "merge", num_outputs=0)
        if is_pruned:
            cropr.calibrate(model, calibration)
        paths[kind] = folder / f"{kind}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cropr.export(model, calibration[:1], paths[kind], dynamic_batch=True)
    return paths


def compare(calls: dict[str, Call], images: Tensor, rounds: int) -> dict[str, float]:
    """Agreement in % on images, and speed over the unpruned float32 file at batch 8."""
    answers = {name: classes(call, images) for name, call in calls.items()}
    times = time_interleaved(
        {name: partial(call, images[:8]) for name, call in calls.items()}, images.device, rounds
    )
    speedup = {name: round(times["unpruned"].seconds / times[name].seconds, 3) for name in calls}
    quantized = agreement(answers["unpruned, int8"], answers["unpruned"])
    return {
        "agreement_float32": agreement(answers["pruned"], answers["unpruned"]),
        "agreement_int8": agreement(answers["pruned, int8"], answers["unpruned, int8"]),
        "agreement_of_quantization": quantized,
        "agreement_of_both": agreement(answers["pruned, int8"], answers["unpruned"]),
        "speedup_float32": speedup["pruned"],
        "speedup_quantization": speedup["unpruned, int8"],
        "speedup_int8": speedup["pruned, int8"],
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=100)
    parser.add_argument("--rate", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "quantized.json")
    options = parser.parse_args()
    archive = options.data / DATA["Tiny-ImageNet"]
    calibration, _ = read_photos(archive, TRAIN, options.photos, 0)
    images, _ = read_photos(archive, VAL, options.photos, 0)
    results = Results(
        options.out,
        environment("cpu") | {"photos": options.photos, "model": "vit_tiny_patch16_224"},
        ("way", "merge", "rate"),
    )
    cells = [(way, merge, options.rate) for way in WAYS for merge in (True, False)]
    samples = calibration[:32]
    with tempfile.TemporaryDirectory() as scratch:
        paths = export_files(options.data, options.rate, calibration, Path(scratch))
        unpruned: dict[str, Call] = {}
        for way, merge, rate in results.remaining(cells):
            quantize, load = WAYS[way]
            path = paths["merge" if merge else "drop"]
            if way not in unpruned:
                unpruned = {way: quantize(paths["unpruned"], samples)}
            calls = {
                "unpruned": load(paths["unpruned"]),
                "pruned": load(path),
                "unpruned, int8": unpruned[way],
                "pruned, int8": quantize(path, samples),
            }
            row = {"way": way, "merge": merge, "rate": rate}
            results.add(row | compare(calls, images, options.rounds))
            print(results.rows[-1], flush=True)


if __name__ == "__main__":
    main()
