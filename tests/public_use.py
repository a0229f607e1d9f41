"""A user's program, for mypy to read as strictly as it can: what is public has types that fit together."""

from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor, nn

from jdkd.data import CocoDetectionDataset, resolve_splits
from jdkd.detect import adopt, detector, load, open_model, read, save
from jdkd.distill import DistillationHandle, DistillConfig, Distilled, attach, distill
from jdkd.errors import InputError
from jdkd.export import Exported, exported, open_exported
from jdkd.functional import pkd_loss
from jdkd.graph import Topology
from jdkd.latency import LatencyReport, measure
from jdkd.nn import ElasticConv2d, ElasticGroups, PearsonTap, PKDLoss, Subnet, set_subnet
from jdkd.pool import PoolTrainConfig, TeacherPool, train_pool
from jdkd.rewrite import Rewrite
from jdkd.search import SearchConfig, search
from jdkd.train import FitReport, Scores, TrainConfig, evaluate, fit


def losses(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    loss = PKDLoss(loss_weight=6.0, statistics="instance")(student, teacher)
    tapped = PearsonTap(6.0)(student, teacher)
    assert isinstance(loss, Tensor) and isinstance(tapped[1], Tensor)
    alone = pkd_loss(student, teacher, 6.0)
    assert isinstance(alone, Tensor)
    return loss + alone


def supernet() -> nn.Conv2d:
    conv = ElasticConv2d(8, 16, 3, padding=1)
    conv.set_active(out_channels=8)
    set_subnet(nn.Sequential(conv), Subnet(channels={"only": 8}), ElasticGroups({"only": [("0", "out")]}))
    plain = conv.export()
    assert isinstance(plain, nn.Conv2d)
    return plain


def cut(model: nn.Module) -> nn.Module:
    topology = read(model)
    assert_type(topology, Topology)
    return Rewrite(keep={group.name: range(group.units // 2) for group in topology.groups}).apply(model, topology)


def taught(student: nn.Module, teacher: nn.Module, data: Path) -> tuple[FitReport, Scores]:
    with attach(student, teacher, loss_weight=10.0) as handle:
        assert_type(handle, DistillationHandle)
    train, val = (CocoDetectionDataset(split) for split in resolve_splits(data))
    found = distill(student, teacher, train, TrainConfig(steps=2), DistillConfig(loss="pkd"))
    assert_type(found, Distilled)
    return fit(student, train, TrainConfig(steps=2), device="cpu"), evaluate(student, val, device="cpu")


def shipped(folder: Path) -> Exported:
    model = load(folder)
    (folder / "model.onnx").write_bytes(exported(model, "onnx"))
    return open_exported(folder / "model.onnx")


def main() -> None:
    features = [torch.randn(1, 8, 4, 4, requires_grad=True)]
    losses(features, [torch.randn(1, 8, 4, 4)]).backward()
    assert supernet().out_channels == 8
    assert callable(shipped) and callable(taught) and callable(cut) and issubclass(InputError, ValueError)
    used = (adopt, detector, open_model, save, measure, LatencyReport, train_pool, TeacherPool, PoolTrainConfig)
    assert all(map(callable, (*used, search, SearchConfig)))


if __name__ == "__main__":
    main()
