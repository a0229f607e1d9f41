"""A stand-in for an exporter: writes a file that finds the same two boxes and one empty row on every image."""

from pathlib import Path

import numpy as np
from torch import nn

BOXES = [[8.0, 8.0, 24.0, 40.0], [0.0, 0.0, 16.0, 16.0], [0.0, 0.0, 0.0, 0.0]]
SCORES = [0.9, 0.5, 0.0]


def write_constant_detector(
    model: nn.Module, file: Path, half: bool, counting: bool = False, *, sizes: bool = True, scores: str = "scores"
):
    from onnx import TensorProto, helper, numpy_helper, save

    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    constants = {
        "one_boxes": np.array([BOXES], dtype=np.float32),
        "one_scores": np.array([SCORES], dtype=np.float32),
        "one_labels": np.array([[1, 3, 0]], dtype=np.int64),
        "three_by_four": np.array([3, 4], dtype=np.int64),
        "three": np.array([3], dtype=np.int64),
    }
    nodes = [
        helper.make_node("Shape", ["images"], ["count"], start=0, end=1),
        helper.make_node("Concat", ["count", "three_by_four"], ["boxes_shape"], axis=0),
        helper.make_node("Concat", ["count", "three"], ["flat_shape"], axis=0),
        helper.make_node("Expand", ["one_boxes", "boxes_shape"], ["boxes"]),
        helper.make_node("Expand", ["one_scores", "flat_shape"], [scores]),
        helper.make_node("Expand", ["one_labels", "flat_shape"], ["labels"]),
    ]
    inputs = [helper.make_tensor_value_info("images", kind, ["N", 3, "H", "W"])]
    inputs += [helper.make_tensor_value_info("sizes", TensorProto.INT64, ["N", 2])] if sizes else []
    outputs = [
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["N", 3, 4]),
        helper.make_tensor_value_info(scores, TensorProto.FLOAT, ["N", 3]),
        helper.make_tensor_value_info("labels", TensorProto.INT64, ["N", 3]),
    ]
    made = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "constant", inputs, outputs, made)
    opset = [helper.make_opsetid("", 17)]
    save(helper.make_model(graph, opset_imports=opset, ir_version=10), file)
