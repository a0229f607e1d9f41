"""What opens an exported file runs where it was asked to run."""

import pytest

from jdkd.errors import InputError
from jdkd.export.opening import onnx_run


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")  # by onnxruntime
def test_a_device_on_which_onnxruntime_cannot_begin_is_refused_and_the_cpu_does_not_stand_in(monkeypatch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("images", "boxes")]
    node = onnx.helper.make_node("Identity", ["images"], ["boxes"])
    graph = onnx.helper.make_graph([node], "small", ports[:1], ports[1:])
    version = {"opset_imports": [onnx.helper.make_opsetid("", 18)], "ir_version": 9}
    content = onnx.helper.make_model(graph, **version).SerializeToString()
    onnx_run(content, "cpu")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(InputError, match="this onnxruntime has no CUDAExecutionProvider"):
        onnx_run(content, "cuda:0")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # none, where onnxruntime is made for GPUs
    with pytest.raises(InputError, match="--device is cuda:0, and onnxruntime cannot begin on it; give --device cpu"):
        onnx_run(content, "cuda:0")
