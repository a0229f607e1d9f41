"""What each of two processes does that :mod:`tests.train.test_distributed` starts."""

import math
import os
import random
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn
from torchvision.models.detection import RetinaNet

from jdkd.data import CocoDetectionDataset, Split, resolve_splits
from jdkd.errors import InputError
from jdkd.pool import Phase, PoolTrainConfig, train_pool
from jdkd.train import DivergenceError, TrainConfig, evaluate, fit
from jdkd.train.distributed import first_goes_ahead, from_first, process_group, processes, rank
from tests.detectors import build, detector, small_spec
from tests.train.scenes import write_scenes

CONFIG = TrainConfig(steps=4, batch_size=2, optimizer="sgd", lr=0.1, checkpoint_every=1, log_every=1, seed=3)
POOL = PoolTrainConfig(
    TrainConfig(steps=5, batch_size=1, lr=1e-4),
    phases=(Phase("largest", 0.4, 0.0, 0, 1.0), Phase("full", 0.6, 1.0, 1, 0.5, sandwich=True)),
)


CURVE = TrainConfig(steps=4, batch_size=2, optimizer="sgd", lr=0.05, flip=0.5, log_every=1, gamma_l1=0.0, seed=1)


def mixed(folder):
    """Landscape and portrait images, five of each."""
    return write_scenes(folder, images=10, size=(48, 80), turned=(1, 3, 4, 7, 8))


def opened(folder):
    return CocoDetectionDataset(Split(folder, folder / "annotations.json"))


def net(classes):
    """A detector whose loss is the mean of its images' losses, that draws nothing and normalises over no batch."""
    torch.manual_seed(0)
    backbone = build(small_spec(norm="frozen")).backbone
    return RetinaNet(backbone, len(classes) + 1, min_size=48, max_size=96)


class Finder(nn.Module):
    """Takes what is bright in a channel for one object of that class."""

    def forward(self, images):
        return [self.found(image) for image in images]

    def found(self, image):
        bright = (image > 0.9).nonzero()  # [pixels, 3] channel, row and column
        each = [bright[bright[:, 0] == channel, 1:].flip(1) for channel in range(3)]
        there = [channel for channel in range(3) if len(each[channel])]
        corners = [torch.cat((each[k].min(0).values, each[k].max(0).values + 1)) for k in there]
        boxes = torch.stack(corners).float() if there else torch.zeros(0, 4)
        return {"boxes": boxes, "labels": torch.tensor(there) + 1, "scores": image.mean((1, 2))[there]}


class Toy(nn.Module):
    """No norm; one weight learns from some images alone, one from none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.rare = nn.Parameter(torch.tensor([0.5]))
        self.unused = nn.Parameter(torch.ones(2, 2))
        self.register_buffer("seen", torch.zeros(()))
        self.order = []

    def forward(self, images, targets):
        self.seen += 1 + rank()
        self.order += [target["image_id"] for target in targets]
        loss = sum((self.conv(image[None]) - 0.3).square().mean() for image in images)
        if rare := sum(target["image_id"] % 4 == 1 for target in targets):
            loss = loss + rare * self.rare.square().sum()
        return {"loss": loss / len(images)}


class Stop(Exception):
    """In the middle of a training."""


def stop(step, total, losses):
    if step == 2:
        raise Stop


def resumed(data, folder):
    """A training that all processes left after two steps, and carried on."""
    with suppress(Stop):
        fit(Toy(), data, CONFIG, device="cpu", folder=folder, progress=stop)
    model = Toy()
    fit(model, data, CONFIG, device="cpu", folder=folder, resume=True)
    return model


def diverged(data):
    """What both are told where one has a loss that is no number."""
    toy = Toy()

    def losses(images, targets, step):
        yield {"loss": toy(images, targets)["loss"] * (math.nan if rank() and step == 1 else 1)}

    try:
        fit(toy, data, CONFIG, device="cpu", losses=losses)
    except DivergenceError as error:
        return error.step, error.what


def curve(scenes, folder):
    """Weights after a training, whose losses are in the log, on landscape and portrait images."""
    model = net(scenes.classes)
    fit(model, scenes, CURVE, device="cpu", folder=folder)
    return model.state_dict()


def unreadable(scenes):
    """What both are told where one cannot read an image of its share."""
    files = [*scenes._files]
    scenes._files[3] = "none.png"  # of the second, in lists of two
    try:
        evaluate(Finder(), scenes, device="cpu", batch_size=2, shared=True)
    except InputError as error:
        return str(error)
    finally:
        scenes._files[:] = files


def raised():
    """What both see where the first fails."""
    try:
        from_first(lambda: {}["missing"])
    except KeyError as error:
        return str(error)


def as_torchrun_starts_it(place: int, port: str, folder: Path, data: Path) -> None:
    """One of the two, which leaves what it found in ``folder``."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"RANK": str(place), "LOCAL_RANK": str(place)}
    warnings.simplefilter("ignore")
    train, selection = (CocoDetectionDataset(split) for split in resolve_splits(data))
    with process_group("cpu") as device:
        with first_goes_ahead():
            scenes = mixed(folder / "scenes") if rank() == 0 else opened(folder / "scenes")
        toy = Toy()
        fit(toy, train, CONFIG, device=device, folder=folder / "whole")
        base = detector(small_spec(classes=train.classes))
        pool = train_pool(base, train, selection, POOL, folder / "pool", scored=1, device=device)
        found = {
            "processes": processes(),
            "order": toy.order,
            "toy": toy.state_dict(),
            "resumed": resumed(train, folder / "cut").state_dict(),
            "diverged": diverged(train),
            "raised": raised(),
            "curve": curve(scenes, folder / "curve"),
            "scores": evaluate(Finder(), scenes, device="cpu", batch_size=2, shared=True),
            "unreadable": unreadable(scenes),
            "drawn": from_first(lambda: random.random()),
            "pool": pool.supernet.model.state_dict(),
            "members": len(pool.members),
        }
        torch.save(found, folder / f"{rank()}.pt")
