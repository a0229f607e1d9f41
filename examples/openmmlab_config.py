"""A config for OpenMMLab: mmrazor's own PKD recipe, with its four losses fused.

Importing ``jdkd.patch`` registers ``FusedPKDLoss``; ``custom_imports`` does so before anything is built. Train with it
as with any config of mmrazor::

    python tools/train.py path/to/openmmlab_config.py

The other way leaves every config as it is: ``jdkd.patch.openmmlab(force=True)`` before the runner is built makes
``type="PKDLoss"`` mean the fused one. Run as a script, this file builds the losses and calls one (mmengine is needed):

    python examples/openmmlab_config.py
"""

_base_ = "mmrazor::distill/mmdet/pkd/pkd_fpn_faster-rcnn_r101_faster-rcnn_r50_2x_coco.py"

custom_imports = {"imports": ["jdkd.patch"], "allow_failed_imports": False}

model = {
    "distiller": {
        "distill_losses": {f"loss_pkd_fpn{level}": {"type": "FusedPKDLoss", "loss_weight": 6} for level in range(4)}
    }
}


def main() -> float:
    import torch

    from jdkd.patch import openmmlab

    openmmlab()  # done by the import already; without mmengine it says so
    from mmengine.registry import MODELS

    losses = {name: MODELS.build(how) for name, how in model["distiller"]["distill_losses"].items()}
    for name, loss in losses.items():
        print(f"{name}: {loss}")
    features = torch.randn(2, 256, 20, 20)
    value = losses["loss_pkd_fpn0"](preds_S=features, preds_T=3 * features + 1).item()
    print(f"of a teacher that differs in scale and offset alone: {value:.6f}")
    return value


if __name__ == "__main__":
    main()
