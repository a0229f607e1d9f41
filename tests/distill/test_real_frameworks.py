"""The frameworks that tests/distill/frameworks.py imitates, where they are installed: what they return changes."""

import pytest
import torch

from jdkd.distill import attach
from jdkd.distill.normalisation import normalisation_from

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

BYTES = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def rt_detr(seed):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    sizes = {"encoder_hidden_dim": 16, "d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 5}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_layers": 1, "num_labels": 2}
    channels = {"encoder_in_channels": [16, 24, 32], "decoder_in_channels": [16] * 3}
    config = transformers.RTDetrConfig(backbone_config=backbone, **channels, **sizes)
    return transformers.RTDetrForObjectDetection(config)


def test_a_hugging_face_teacher_sees_what_its_own_image_processor_makes():
    student, teacher = rt_detr(0).train(), rt_detr(1)
    from transformers import DetrImageProcessor, RTDetrImageProcessor

    processors = [kind(size={"height": 64, "width": 64}) for kind in (RTDetrImageProcessor, DetrImageProcessor)]
    ours, theirs = (each([*BYTES], return_tensors="pt")["pixel_values"] for each in processors)
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}] * 2
    seen = []
    hook = {"with_kwargs": True}
    teacher.model.backbone.register_forward_pre_hook(lambda _, given, named: seen.extend(given[:1]), **hook)
    own, his = processors
    with attach(student, teacher, student_normalisation=own, teacher_normalisation=his) as handle:
        outputs = student(pixel_values=ours, labels=labels)
    torch.testing.assert_close(seen[0], theirs, rtol=1e-4, atol=1e-4)
    assert (ours - theirs).abs().max() > 0.5 and list(handle.losses) == [8, 16, 32]
    outputs.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in student.model.backbone.parameters() if p.grad is not None)


def test_a_model_of_ultralytics_has_one_more_loss(tmp_path, monkeypatch):
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    from ultralytics.utils import DEFAULT_CFG

    def yolo(name):
        model = tasks.DetectionModel(name, nc=3, verbose=False)
        model.args = DEFAULT_CFG
        return model

    student = yolo("yolov8n.yaml").train()
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4]] * 2)
    batch = {"img": BYTES / 255, "batch_idx": torch.tensor([0.0, 1.0]), "cls": torch.zeros(2, 1), "bboxes": boxes}
    with attach(student, yolo("yolov8s.yaml"), adapter=True) as handle:
        handle.calibrate([batch])
        losses, _ = student(batch)
        losses.sum().backward()
    assert losses.shape == (4,) and losses[3].item() == pytest.approx(float(sum(handle.losses.values())))
    assert list(handle.losses) == [8, 16, 32] and student.model[0].conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "bgr_to_rgb": True},
        {"mean": [103.53, 116.28, 123.675], "std": [1.0, 1.0, 1.0]},
        {"mean": [0.0] * 3, "std": [255.0] * 3, "bgr_to_rgb": True},
    ],
)
def test_a_preprocessor_of_mmengine_does_what_is_read_off_it(options):
    """It is given what OpenMMLab reads: blue first, 0..255."""
    preprocessor = pytest.importorskip("mmengine.model").ImgDataPreprocessor(**options)
    given = preprocessor({"inputs": [BYTES[0].flip(0)], "data_samples": None})["inputs"][0]
    found = normalisation_from(preprocessor, "teacher")
    image = (BYTES[0] / 255).flip(0) if found.order == "bgr" else BYTES[0] / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (found.mean, found.std))
    torch.testing.assert_close(given.float(), (found.scale * image - mean) / std, rtol=1e-4, atol=1e-4)
