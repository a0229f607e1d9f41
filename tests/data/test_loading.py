"""Batch k is a function of (seed, k), however it is read."""

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from jdkd.data import CocoDetectionDataset, batches, in_order
from jdkd.data.reading_ahead import read_ahead
from jdkd.errors import InputError
from jdkd.notices import Notice
from tests.train.scenes import write_scenes

from . import folders

IMAGES = 7


@pytest.fixture
def dataset(tmp_path):
    return CocoDetectionDataset(folders.write(tmp_path, images=IMAGES))


def ids(stream):
    return [[target["image_id"] for target in targets] for _, targets in stream]


def ids_one_by_one(stream):
    return (target["image_id"] for _, targets in stream for target in targets)


def same(a, b):
    """Whether two lists of batches are equal in every pixel and box."""
    return len(a) == len(b) and all(
        all(torch.equal(x, y) for x, y in zip(images, others, strict=True))
        and all(
            torch.equal(t["boxes"], o["boxes"]) and torch.equal(t["labels"], o["labels"])
            for t, o in zip(targets, other_targets, strict=True)
        )
        for (images, targets), (others, other_targets) in zip(a, b, strict=True)
    )


def test_images_are_floats_up_to_one_with_their_targets(dataset):
    images, targets = next(batches(dataset, batch_size=3, steps=1, seed=0))
    assert len(images) == len(targets) == 3
    for image, target in zip(images, targets, strict=True):
        expected, truth = dataset[dataset.image_ids.index(target["image_id"])]
        assert image.dtype == torch.float32 and image.max() == 1
        assert torch.allclose(image, expected / 255)
        assert torch.equal(target["boxes"], truth["boxes"])


def test_every_epoch_shows_every_image_once_in_another_order(dataset):
    shown = [i for batch in ids(batches(dataset, batch_size=2, steps=14, seed=0)) for i in batch]
    epochs = [shown[at : at + IMAGES] for at in range(0, len(shown), IMAGES)]
    assert all(sorted(epoch) == dataset.image_ids for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_a_batch_larger_than_the_data_set_goes_on_into_the_next_epochs(dataset):
    ((images, targets),) = batches(dataset, batch_size=2 * IMAGES + 1, steps=1, seed=3)
    counts = Counter(target["image_id"] for target in targets)
    assert len(images) == 2 * IMAGES + 1 and sorted(counts.values()) == [2] * (IMAGES - 1) + [3]


def test_starting_late_is_the_same_as_skipping(dataset):
    settings = {"batch_size": 3, "steps": 9, "seed": 5, "flip": 0.5}
    whole = list(batches(dataset, **settings))
    assert len(whole) == 9
    for start in (0, 1, 4, 9):
        assert same(list(batches(dataset, start=start, **settings)), whole[start:])
    assert list(batches(dataset, start=12, **settings)) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_workers_change_nothing(dataset):
    settings = {"batch_size": 3, "steps": 6, "seed": 5, "flip": 0.5, "start": 1}
    assert same(list(batches(dataset, workers=2, **settings)), list(batches(dataset, **settings)))


def test_seeds_differ_and_repeat(dataset):
    first, again, other = (ids(batches(dataset, batch_size=4, steps=5, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_seeds_flip_differently(dataset):
    def flips(seed):
        stream = batches(dataset, batch_size=20, steps=1, seed=seed, flip=0.5)
        return [image[0, 0, 0].item() < 1 for images, _ in stream for image in images]

    assert flips(1) == flips(1) != flips(2)


def test_flips_mirror_pixels_and_boxes_together(dataset):
    settings = {"batch_size": 4, "steps": 6, "seed": 0}
    plain, mirrored = list(batches(dataset, **settings)), list(batches(dataset, flip=1.0, **settings))
    for (images, targets), (turned, turned_targets) in zip(plain, mirrored, strict=True):
        for image, target, other, turned_target in zip(images, targets, turned, turned_targets, strict=True):
            assert torch.equal(other, image.flip(-1))
            left, top, right, bottom = target["boxes"].unbind(1)
            expected = torch.stack([folders.WIDTH - right, top, folders.WIDTH - left, bottom], dim=1)
            assert torch.equal(turned_target["boxes"], expected)
            assert type(turned_target["boxes"]) is torch.Tensor
            assert torch.equal(turned_target["labels"], target["labels"])


@pytest.mark.parametrize("settings", [{}, {"by_aspect": True, "flip": 0.5}, {"flip": 0.5}])
def test_batches_of_one_step_are_together_what_one_batch_is(tmp_path, settings):
    scenes = write_scenes(tmp_path, images=9, size=(32, 40), turned=(0, 2, 3, 7))
    settings = {"seed": 5, **settings}
    whole = list(batches(scenes, batch_size=4, steps=6, **settings))
    parts = list(batches(scenes, batch_size=2, steps=12, joined=2, **settings))
    joined = [(a + c, b + d) for (a, b), (c, d) in zip(parts[::2], parts[1::2], strict=True)]
    assert same(joined, whole)
    shares = [list(batches(scenes, batch_size=2, steps=12, joined=2, start=k, every=2, **settings)) for k in (0, 1)]
    assert same(shares[0], parts[::2]) and same(shares[1], parts[1::2])


def test_by_aspect_a_batch_is_landscape_or_portrait(tmp_path):
    scenes = write_scenes(tmp_path, images=9, size=(32, 40), turned=(0, 2, 3, 7))
    shapes = [{image.shape[1:] for image in images} for images, _ in batches(scenes, batch_size=3, steps=12, seed=0)]
    assert max(map(len, shapes)) == 2
    grouped = batches(scenes, batch_size=3, steps=12, seed=0, by_aspect=True)
    shapes = [{image.shape[1:] for image in images} for images, _ in grouped]
    assert set(map(len, shapes)) == {1} and set.union(*shapes) == {(32, 40), (40, 32)}


def test_about_the_asked_share_is_flipped(dataset):
    flipped = [
        image[0, 0, 0].item() < 1  # the white half row starts left
        for images, _ in batches(dataset, batch_size=8, steps=50, seed=0, flip=0.3)
        for image in images
    ]
    batches_flipped = [tuple(flipped[at : at + 8]) for at in range(0, len(flipped), 8)]
    assert len(set(batches_flipped)) > 20  # drawn anew for every batch
    assert 0.22 < sum(flipped) / len(flipped) < 0.38


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_random_state_is_left_alone(dataset, workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = ids(batches(dataset, batch_size=2, steps=2, seed=0, flip=0.5, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert ids(batches(dataset, batch_size=2, steps=2, seed=0, flip=0.5, workers=workers)) == first


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_truncated_meanwhile_stops_with_one_sentence_and_not_before_its_batch(dataset, workers):
    file = dataset.split.images / "3.png"
    before = dataset.fingerprint
    file.write_bytes(file.read_bytes()[:60])
    stream = ids_one_by_one(batches(dataset, batch_size=1, steps=IMAGES, seed=0, workers=workers))
    shown: list[int] = []
    with pytest.raises(InputError) as refusal:
        shown.extend(stream)  # extends by what comes before the error
    sentence = str(refusal.value)
    assert str(file) in sentence and "\n" not in sentence and "Traceback" not in sentence
    assert 0 < len(shown) < IMAGES and 13 not in shown
    assert "put a sound copy of it in its place" in sentence and "remove" not in sentence
    folders.write(file.parents[1], images=IMAGES)  # does as advised: the data are the same, a run may be resumed
    assert CocoDetectionDataset(dataset.split).fingerprint == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_in_order_every_image_comes_once_with_its_pixels_and_targets(dataset, workers):
    stream = list(in_order(dataset, batch_size=3, workers=workers))
    assert [len(items) for items in stream] == [3, 3, 1]
    for (image, target), (expected, truth) in zip((i for items in stream for i in items), dataset, strict=True):
        assert torch.equal(image, expected) and target["image_id"] == truth["image_id"]
        assert torch.equal(target["boxes"], truth["boxes"]) and torch.equal(target["labels"], truth["labels"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_in_order_an_unreadable_image_is_one_sentence(dataset, workers):
    (dataset.split.images / "4.png").unlink()
    with pytest.raises(InputError, match=r"4\.png is missing; put it there") as refusal:
        list(in_order(dataset, batch_size=3, workers=workers))
    assert "Traceback" not in str(refusal.value)


class Deadly:
    """Batches whose third ends the process that reads it, as the kernel does when memory runs out."""

    def __getitem__(self, number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return [(torch.zeros(3, 2, 2, dtype=torch.uint8), {})]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's loader, when it is collected
def test_a_worker_that_is_killed_is_one_sentence():
    with pytest.raises(InputError, match=r"one of 1 worker processes died .* give fewer --workers, or 0"):
        list(read_ahead(Deadly(), range(5), workers=1))


def test_a_sliver_that_mirroring_would_close_is_no_box(tmp_path):
    def slivers(content):
        for record, width in zip(content["annotations"], (5e-7, 1e-5, 3e-5), strict=False):
            record.update(bbox=[0, 2, width, 5], area=None)

    with pytest.warns(Notice, match="2 of 6 boxes without area, left out"):
        dataset = CocoDetectionDataset(folders.write(tmp_path, slivers))
    for _, targets in batches(dataset, batch_size=3, steps=4, seed=0, flip=1.0):
        boxes = torch.cat([target["boxes"] for target in targets])
        assert len(boxes) == 1 and (boxes[:, 2:] > boxes[:, :2]).all()


FEW_FILES = """
import os, resource, sys
from pathlib import Path
from jdkd.data import CocoDetectionDataset, Split, batches
from jdkd.errors import InputError

folder = Path(sys.argv[1])
dataset = CocoDetectionDataset(Split(folder / "val2017", folder / "annotations/instances_val2017.json"))
for soft, hard, workers in ((40, 4096, 2), (64, 64, 3), (64, 64, 2)):
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        stream = batches(dataset, batch_size=16, steps=6, seed=0, workers=workers)
        print(sum(len(images) for images, _ in stream), "images")
    except InputError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not limit open files")
def test_a_low_limit_of_open_files_is_raised_or_said_with_advice_that_works(dataset):
    command = [sys.executable, "-W", "ignore", "-c", FEW_FILES, str(dataset.split.images.parent)]
    root = Path(__file__).parents[2]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=root)
    assert (answer.returncode, answer.stderr) == (0, "")
    raised, refused, as_advised = answer.stdout.splitlines()
    assert raised == as_advised == "96 images"
    assert "3 worker processes need about" in refused and "may open 64" in refused and "give --workers 2" in refused


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"batch_size": 0}, "batch_size is 0 but must be at least 1"),
        ({"steps": -1}, "steps is -1"),
        ({"start": -2}, "start is -2"),
        ({"seed": -1}, "seed is -1"),
        ({"joined": 0}, "joined is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"flip": 1.5}, "flip is 1.5 but is a probability"),
    ],
)
def test_nonsense_is_refused_before_anything_is_read(dataset, wrong, said):
    with pytest.raises(InputError, match=said):
        batches(dataset, **{"batch_size": 1, "steps": 1, "seed": 0, **wrong})
