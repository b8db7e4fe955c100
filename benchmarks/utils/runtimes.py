"""Exported files as functions of images, in the runtimes that benchmarks compare."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Call = Callable[[Tensor], Tensor]


def onnxruntime_call(path: Path) -> Call:
    """Load a file in onnxruntime, on as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads spin within a call only, and take no time of the next one
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def openvino_call(path: Path, precision: str) -> Call:
    """Compile for each batch size when it comes: dynamic ones cost OpenVINO 3 to 6 %."""
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled: dict[int, Callable[..., Any]] = {}

    def call(images: Tensor) -> Tensor:
        if len(images) not in compiled:
            model = openvino.Core().read_model(path)
            model.reshape(list(images.shape))
            compiled[len(images)] = openvino.compile_model(model, "CPU", options)
        return torch.from_numpy(compiled[len(images)](images.numpy())[0].copy())

    return call
