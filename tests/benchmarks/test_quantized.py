"""Quantised files: what stays in float32."""

import numpy as np
import pytest
import torch
from helpers.extras import require
from helpers.models import MODELS, randomize

import cropr_kernels as cropr

require("onnx", "onnxscript", "onnxruntime")

from benchmarks.accuracy import quantized  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # exporters warn of their own deprecations


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """Return the file of a model that merges, and images."""
    torch.manual_seed(0)
    model = cropr.apply(randomize(MODELS["reference"]()).eval(), rate=9, merge=True, num_outputs=0)
    images, path = torch.randn(2, 3, 64, 64), tmp_path_factory.mktemp("quantized") / "merge.onnx"
    cropr.export(model, images[:1], path, dynamic_batch=True)
    return path, images


def product_before(node, producers):
    """Return the last MatMul that a node reads, along first inputs."""
    while node.op_type != "MatMul":
        node = producers[node.input[0]]
    return node


@pytest.mark.slow
def test_products_that_choose_tokens_stay_in_float32(merging):
    import onnx

    path, images = merging
    quantized.static(path, images)
    graph = onnx.load(path.with_name("merge-static.onnx")).graph
    producers = {name: node for node in graph.node for name in node.output}
    nearest = [node for node in graph.node if node.op_type == "ArgMax"]
    assert len(nearest) == 3
    for node in nearest:
        for name in product_before(node, producers).input:
            assert producers[name].op_type != "DequantizeLinear"
    weighted = [
        node
        for node in graph.node
        if node.op_type == "MatMul" and producers[node.input[1]].op_type == "DequantizeLinear"
    ]
    assert len(weighted) == len(quantized.products_of_weights(path))


def test_products_of_massive_outliers_are_named(tmp_path):
    import onnx
    from onnx import helper, numpy_helper

    generator = np.random.default_rng(0)
    weights = generator.standard_normal((64, 64)).astype(np.float32)
    images = generator.standard_normal((2, 128, 64)).astype(np.float32)
    images[1, 5, 7] = 1000
    nodes = [
        helper.make_node("MatMul", ["images", "weight"], ["first"], "massive"),
        helper.make_node("LayerNormalization", ["images", "ones"], ["norm"]),
        helper.make_node("MatMul", ["norm", "weight"], ["second"], "usual"),
        helper.make_node("Add", ["first", "second"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1, 128, 64])],
        [helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, [1, 128, 64])],
        [
            numpy_helper.from_array(weights, "weight"),
            numpy_helper.from_array(np.ones(64, np.float32), "ones"),
        ],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    assert quantized.products_of_outliers(path, torch.from_numpy(images)) == ["massive"]
    assert quantized.products_of_activations(path) == []
