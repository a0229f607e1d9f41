"""What only a GPU can show of training and distillation."""

import pytest
import torch

pytest.importorskip("torchvision")

from jdkd.distill import Distiller
from jdkd.train import DivergenceError, TrainConfig, calibrate_bn, fit
from tests.detectors import CLASSES, detector, small_spec
from tests.train.toy import same, values

pytestmark = pytest.mark.gpu
GPU = {"device": "cuda"}


class Rectangles:
    """Scenes in memory, as a dataset of :mod:`jdkd.data` shows itself."""

    classes = CLASSES
    image_ids = list(range(8))  # noqa: RUF012

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int):
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(90, 110, (3, 64, 64), dtype=torch.uint8, generator=generator)
        x, y = torch.randint(0, 32, (2,), generator=generator).tolist()
        image[index % 3, y : y + 24, x : x + 28] = 240
        boxes = torch.tensor([[x, y, x + 28.0, y + 24.0]])
        return image, {"boxes": boxes, "labels": torch.tensor([index % 3 + 1]), "image_id": index}


def test_trains_in_bf16_with_a_teacher_that_began_on_the_cpu():
    student, teacher = detector(small_spec()), detector(small_spec("bottleneck"), seed=7)
    seen = []
    with Distiller(student, teacher, head_weight=1.0, reuse=True) as distiller:

        def losses(images, targets, step):
            for _ in range(2):
                yield student(images, targets) | distiller.losses()

        config = TrainConfig(steps=30, batch_size=4, log_every=1)
        fit(
            student,
            Rectangles(),
            config,
            **GPU,
            losses=losses,
            progress=lambda s, n, terms: seen.append(terms),
        )
    assert seen[-1]["loss_pkd"] < 0.8 * seen[0]["loss_pkd"]
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values())


def test_divergence_is_found_at_the_next_log_line_with_its_true_step(tmp_path):
    model = detector(small_spec())

    def losses(images, targets, step):
        terms = model(images, targets)
        if step == 6:
            terms["loss_objectness"] = terms["loss_objectness"] * float("nan")
        yield terms

    config = TrainConfig(steps=20, batch_size=2, log_every=10, checkpoint_every=5)
    with pytest.raises(DivergenceError, match="step 7 of 20: loss_objectness is not finite"):
        fit(model, Rectangles(), config, **GPU, losses=losses, folder=tmp_path)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["step"] == 5
    assert all(tensor.isfinite().all() for tensor in kept["model"].values())


def test_a_step_between_log_lines_does_not_wait_for_the_gpu():
    config = TrainConfig(steps=4, batch_size=2, log_every=100, clip=1.0, amp="bf16")
    weight = torch.nn.Linear(3, 1)
    modes = []

    def losses(images, targets, step):
        torch.cuda.set_sync_debug_mode("error" if step in (1, 2) else "default")
        modes.append(step)
        yield {"loss": weight(torch.ones(1, 3, device="cuda")).sum()}

    try:
        fit(weight, Rectangles(), config, **GPU, losses=losses)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert modes == [0, 1, 2, 3]


def test_resumes_on_a_gpu(tmp_path):
    config = TrainConfig(steps=6, batch_size=2, checkpoint_every=3)
    model, again = detector(small_spec()), detector(small_spec())

    def stop(step, total, losses):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, Rectangles(), config, **GPU, folder=tmp_path, progress=stop)
    assert fit(again, Rectangles(), config, **GPU, folder=tmp_path, resume=True).steps == 6
    assert not same(values(model), values(again))


def test_calibration_agrees_with_the_cpu():
    model, images = detector(small_spec()), [torch.rand(3, 64, 64) for _ in range(4)]
    calibrate_bn(model, [images[:2], images[2:]])
    there = detector(small_spec()).cuda()
    calibrate_bn(there, [images[:2], images[2:]])
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(there.state_dict()[name].cpu(), tensor, rtol=1e-2, atol=1e-2)
