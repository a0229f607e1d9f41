"""A torchvision detector with a teacher, by one call.

``attach`` adds ``loss_pkd`` to the losses that the student returns while training. The rest is torchvision's usual
loop, and the weights at the end are those of a stock detector. The networks are untrained and the images noise, so that
nothing is downloaded; give the teacher ``weights="DEFAULT"`` for a real one.

    python examples/torchvision_detector.py
"""

import torch
from torchvision.models.detection import retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2

from jdkd.distill import attach


def main(steps: int = 12, size: int = 128) -> list[float]:
    torch.manual_seed(0)
    untrained = {"weights": None, "weights_backbone": None, "num_classes": 4, "min_size": size, "max_size": size}
    student, teacher = retinanet_resnet50_fpn(**untrained), retinanet_resnet50_fpn_v2(**untrained)
    images = [torch.rand(3, size, size) for _ in range(2)]
    box = torch.tensor([[0.1 * size, 0.1 * size, 0.7 * size, 0.6 * size]])
    targets = [{"boxes": box, "labels": torch.tensor([label])} for label in (1, 2)]
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-4)
    history = []

    with attach(student, teacher, loss_weight=10.0) as handle:
        for step in range(steps):
            losses = student(images, targets)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            history.append(losses["loss_pkd"].item())
            levels = "  ".join(f"stride {stride}: {loss:.3f}" for stride, loss in handle.losses.items())
            print(f"step {step:3d}  loss_pkd {history[-1]:.3f}  {levels}")

    retinanet_resnet50_fpn(**untrained).load_state_dict(student.state_dict(), strict=True)
    print("the student's weights load into a stock retinanet_resnet50_fpn")
    return history


if __name__ == "__main__":
    main()
