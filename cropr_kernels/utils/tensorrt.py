"""TensorRT's documented limits on ONNX, checked on the graph of a file: TensorRT is not needed."""

from pathlib import Path
from typing import Any

from .optional import import_optional

# Support matrix of ONNX operators and ITopKLayer in TensorRT's documentation
MAX_TOP = 3840
OPSETS = range(9, 21)  # of all versions from 10.0 on
_UNSUPPORTED = ("Unique", "NonZero", "If", "Loop", "Scan", "BitShift", "Det", "Compress")
# The input that must be a constant
_CONSTANT_INPUTS = {"TopK": 1, "CumSum": 1, "ReduceSum": 1, "ReduceMax": 1, "Unsqueeze": 1}
_FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16")
_FLOAT_OPS = ("TopK", "CumSum", "ReduceSum", "ReduceMax", "ArgMax", "MatMul", "LayerNormalization")


def unsupported_nodes(path: str | Path) -> list[str]:
    """Return one sentence for each kind of node of an ONNX file that TensorRT refuses.

    Checked are the opset, operators, constant inputs, K of TopK, its order, and dtypes: float64
    anywhere, and integers where an operator takes floats only.

    Raises ImportError if onnx is not installed.
    """
    onnx = import_optional("onnx", "export", "a check of an ONNX file")
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    graph = model.graph
    constants = {value.name: value for value in graph.initializer}
    constants |= {node.output[0]: None for node in graph.node if node.op_type == "Constant"}
    dtypes = {value.name: value.data_type for value in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        dtypes[value.name] = value.type.tensor_type.elem_type
    name_of: Any = onnx.TensorProto.DataType.Name
    problems: list[str] = []
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version not in OPSETS:
            problems.append(f"opset {opset.version} is not in [{OPSETS[0]}, {OPSETS[-1]}]")
        elif opset.domain not in ("", "ai.onnx"):
            problems.append(f"operators of domain {opset.domain} are not standard ones")
    for node in graph.node:
        inputs = [name_of(dtypes.get(name, 0)) for name in node.input]
        constant = _CONSTANT_INPUTS.get(node.op_type)
        if node.op_type in _UNSUPPORTED:
            problems.append(f"operator {node.op_type} is not supported, or of dynamic shape")
        if "DOUBLE" in inputs:
            problems.append(f"{node.op_type} computes in float64, which becomes float32")
        if node.op_type in _FLOAT_OPS and inputs[0] not in (*_FLOATS, "UNDEFINED"):
            problems.append(f"{node.op_type} takes floats, got {inputs[0]}")
        if constant is not None and constant < len(node.input):
            value = constants.get(node.input[constant], "dynamic")
            if value == "dynamic":
                problems.append(f"{node.op_type} needs a constant input {constant}")
            elif node.op_type == "TopK" and value is not None:
                [count] = onnx.numpy_helper.to_array(value).ravel()
                if count > MAX_TOP:
                    problems.append(f"TopK takes at most {MAX_TOP} elements, got {count}")
        if node.op_type == "TopK" and any(
            attribute.name == "sorted" and attribute.i != 1 for attribute in node.attribute
        ):
            problems.append("TopK must be sorted")
    return list(dict.fromkeys(problems))
