"""Statistics over several processes: two of them, with batches of different size, against one with all the images."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jdkd.errors import InputError
from jdkd.functional import pearson_tap, pkd_loss
from jdkd.nn import PearsonTap
from tests.ranks import found_by_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
BATCHES = (3, 1)  # images of each rank


class Student(nn.Module):
    """Two levels from one image, and a head's loss on what is returned of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.down = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, padding=1)

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.stem(images)
        return [fine, self.down(fine.relu())]


def batch() -> tuple[Tensor, list[Tensor], Tensor]:
    """Images, teacher levels, and a padding mask, of all ranks."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(sum(BATCHES), 3, 9, 7, generator=generator)
    teachers = [torch.randn(sum(BATCHES), 4, *size, generator=generator) + 20 for size in ((9, 7), (5, 4))]
    mask = torch.ones(sum(BATCHES), 9, 7, dtype=torch.bool)
    mask[1, 5:], mask[3, :, 4:] = False, False
    return images, teachers, mask


def gradients_of(model: nn.Module, share: slice, options: dict, *, tap: bool) -> tuple[Tensor, list[Tensor]]:
    images, teachers, mask = batch()
    options = {**options, "mask": mask[share]} if options.pop("masked") else options
    levels, teachers = model(images[share]), [level[share] for level in teachers]
    if tap:
        levels, loss = pearson_tap(levels, teachers, 6.0, **options)
        heads = sum(level.mean() for level in levels)  # as detectors have it: a mean over the rank's images
        (loss + 0 * heads).backward()
    else:
        loss = pkd_loss(levels, teachers, 6.0, **options)
        loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


CASES = [(False, False), (False, True), (True, False)]  # masked, tap


def job(rank: int) -> list[tuple[Tensor, list[Tensor]]]:
    first = sum(BATCHES[:rank])
    share, found = slice(first, first + BATCHES[rank]), []
    for masked, tap in CASES:
        options = {"group": dist.group.WORLD, "masked": masked}
        found.append(gradients_of(DistributedDataParallel(Student()), share, options, tap=tap))
    return found


@pytest.fixture(scope="module")
def ranks() -> list[list[tuple[Tensor, list[Tensor]]]]:
    """What every rank found in every case; starting the processes takes longer than all of the work."""
    return found_by_ranks(job)


@pytest.mark.parametrize("case", CASES, ids=["plain", "tap", "masked"])
def test_ranks_of_different_size_train_as_one_process_with_all_images(ranks, case: tuple[bool, bool]):
    masked, tap = case
    results = [found[CASES.index(case)] for found in ranks]
    expected_loss, expected = gradients_of(Student(), slice(None), {"masked": masked}, tap=tap)
    unit = max(gradient.abs().max().item() for gradient in expected)  # a bias's is zero: the loss ignores offsets
    for loss, gradients in results:
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        for found, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * unit)
    assert torch.equal(results[0][0], results[1][0])  # the same bits on every rank


def test_a_group_of_one_changes_nothing(tmp_path: Path):
    dist.init_process_group("gloo", store=dist.FileStore(f"{tmp_path}/store", 1), rank=0, world_size=1)
    try:
        loss, gradients = gradients_of(Student(), slice(None), {"group": dist.group.WORLD, "masked": False}, tap=False)
        tap = PearsonTap(6.0, group=dist.group.WORLD)
        copy = deepcopy(tap)  # as an exponential average of a student makes
        assert copy is not tap and copy.options == tap.options and copy.options is not tap.options
        with pytest.raises(InputError, match="takes every image by itself"):
            pkd_loss(torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3), statistics="instance", group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    expected_loss, expected = gradients_of(Student(), slice(None), {"masked": False}, tap=False)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
