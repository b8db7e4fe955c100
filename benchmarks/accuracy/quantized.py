"""Quantise exported files in int8, pruned and not, and compare them on photos.

python -m benchmarks.accuracy.quantized --data FOLDER [--photos 100] [--rate 8]
    -> benchmarks/results/quantized.json

FOLDER as in benchmarks/accuracy/data.py. Ways: onnxruntime's dynamic quantisation, its static one
after `quant_pre_process`, and NNCF's on OpenVINO. The agreement of the pruned file is with the
unpruned file that was quantised alike; speed-up and agreement with float32 are over the unpruned
float32 file of the same runtime.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cropr_kernels as cropr
from benchmarks.accuracy.data import DATA, TRAIN, VAL, load_model, read_photos
from benchmarks.utils.results import RESULTS, Results, environment
from benchmarks.utils.runtimes import onnxruntime_call, openvino_call
from cropr_kernels.utils.timing import time_interleaved

Call = Callable[[Tensor], Tensor]


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
    quantize_dynamic(path, out)
    return onnxruntime_call(out)


def static(path: Path, images: Tensor) -> Call:
    from onnxruntime.quantization import quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_name(f"{path.stem}-prepared.onnx")
    out = path.with_name(f"{path.stem}-static.onnx")
    quant_pre_process(path, prepared)
    # Similarities and scores stay in float32: they choose tokens
    quantize_static(
        prepared,
        out,
        Reader(images),
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        nodes_to_exclude=products_of_activations(prepared),
    )
    return onnxruntime_call(out)


def products_of_activations(path: Path) -> list[str]:
    """Names of the MatMul nodes without weights."""
    import onnx

    graph = onnx.load(path).graph
    weights = {value.name for value in graph.initializer}
    return [
        node.name
        for node in graph.node
        if node.op_type == "MatMul" and not weights & set(node.input)
    ]


def nncf_int8(path: Path, images: Tensor) -> Call:
    import nncf
    import openvino

    model = openvino.convert_model(path)
    dataset = nncf.Dataset([photo.numpy() for photo in images.split(1)])
    quantized = nncf.quantize(
        model,
        dataset,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(images),
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
    return torch.cat([call(part).argmax(1) for part in images.split(4)])


def agreement(a: Tensor, b: Tensor) -> float:
    return round(100 * (a == b).float().mean().item(), 1)


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
    with tempfile.TemporaryDirectory() as scratch:
        paths: dict[str, Path] = {}
        for kind, rate, merge in (
            ("unpruned", 0, False),
            ("merge", options.rate, True),
            ("drop", options.rate, False),
        ):
            model, _ = load_model(options.data)
            cropr.apply(model, rate=rate, merge=merge, num_outputs=0)
            if rate:
                cropr.calibrate(model, calibration)
            paths[kind] = Path(scratch) / f"{kind}.onnx"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cropr.export(model, images[:1], paths[kind], dynamic_batch=True)
        for way, merge, rate in results.remaining(cells):
            quantize, load = WAYS[way]
            kind = "merge" if merge else "drop"
            samples = calibration[:32]
            calls = {
                "unpruned": load(paths["unpruned"]),
                "pruned": load(paths[kind]),
                "unpruned, int8": quantize(paths["unpruned"], samples),
                "pruned, int8": quantize(paths[kind], samples),
            }
            answers = {name: classes(call, images) for name, call in calls.items()}
            times = time_interleaved(
                {name: partial(call, images[:8]) for name, call in calls.items()},
                images.device,
                options.rounds,
            )
            seconds = times["unpruned"].seconds
            results.add(
                {
                    "way": way,
                    "merge": merge,
                    "rate": rate,
                    "agreement_float32": agreement(answers["pruned"], answers["unpruned"]),
                    "agreement_int8": agreement(answers["pruned, int8"], answers["unpruned, int8"]),
                    "agreement_of_quantization": agreement(
                        answers["unpruned, int8"], answers["unpruned"]
                    ),
                    "speedup_float32": round(seconds / times["pruned"].seconds, 3),
                    "speedup_quantization": round(seconds / times["unpruned, int8"].seconds, 3),
                    "speedup_int8": round(seconds / times["pruned, int8"].seconds, 3),
                }
            )
            print(results.rows[-1], flush=True)


if __name__ == "__main__":
    main()
