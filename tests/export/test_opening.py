"""What opens an exported file runs where it was asked to run."""

import io
import json

import numpy as np
import pytest
import torch

from jdkd.errors import InputError
from jdkd.export.opening import FACTS, FORMAT, onnx_run, open_exported, pt2_run


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


class Inside(torch.nn.Module):
    """Makes tensors as it runs, on the device of its input."""

    def forward(self, images, sizes):
        rows = torch.arange(images.shape[2], device=images.device)
        return ((rows < sizes[:, :1]) & (images[:, 0, :, 0] < images.new_tensor([1.0])),)


def test_an_exported_program_runs_wholly_on_the_device_that_is_asked_for():
    given, stream = (torch.zeros(2, 3, 4, 5), torch.full((2, 2), 3)), io.BytesIO()
    torch.export.save(torch.export.export(Inside(), given, strict=False), stream, extra_files={FACTS: "{}"})
    there, here = (pt2_run(stream.getvalue(), device)[0] for device in ("meta", "cpu"))
    given = [each.numpy() for each in given]
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # the result, from there
        there(*given)
    assert [output.tolist() for output in here(*given)] == [2 * [[True, True, True, False]]]


def test_what_a_runtime_raises_is_one_sentence(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    ports = [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["N", 3, "H", "W"])]
    ports.append(onnx.helper.make_tensor_value_info("sizes", onnx.TensorProto.INT64, ["N", 2]))
    out = onnx.helper.make_tensor_value_info("boxes", onnx.TensorProto.FLOAT, [7])
    shape = onnx.helper.make_tensor("shape", onnx.TensorProto.INT64, [1], [7])
    node = onnx.helper.make_node("Reshape", ["images", "shape"], ["boxes"])
    graph = onnx.helper.make_graph([node], "of one size", ports, [out], [shape])
    version = {"opset_imports": [onnx.helper.make_opsetid("", 18)], "ir_version": 9}
    model, file = onnx.helper.make_model(graph, **version), tmp_path / "baked.onnx"
    told = {"format": FORMAT, "outputs": ["boxes"], "resize": {"min_size": 8, "max_size": 8, "multiple": 8}}
    onnx.helper.set_model_props(model, {FACTS: json.dumps(told)})
    onnx.save(model, file)
    opened = open_exported(file)
    assert opened.runtime == "onnxruntime"
    words = (
        r"^onnxruntime cannot run the file on a batch \[1, 3, 8, 8\] \(.+\); export it anew, or in another format\.$"
    )
    with pytest.raises(InputError, match=words):
        opened([np.zeros((8, 8, 3), dtype=np.uint8)])
    file.write_bytes(b"torn")
    with pytest.raises(InputError, match=r"baked\.onnx: onnxruntime cannot open the file \(.+\); export it anew"):
        open_exported(file)
    file = file.rename(tmp_path / "baked.engine")
    with pytest.raises(InputError, match=r"baked\.engine ends with none of \.onnx, \.pt2; give a file"):
        open_exported(file)
