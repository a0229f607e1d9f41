"""A large annotation file is parsed once, and never taken for another."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.data_loading import LARGE, large, opened
from jdkd.data import CocoDetectionDataset, annotations, checking, index, masks
from jdkd.data.annotations import Annotations, inspect_annotations, open_annotations
from jdkd.errors import InputError
from jdkd.notices import Notice

from . import folders
from .annotation_files import box, only, write_annotations


@pytest.fixture(autouse=True)
def every_file_has_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "LEAST_BYTES", 0)
    monkeypatch.setenv("JDKD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def parsed(monkeypatch):
    """The files that were parsed, one by one."""
    files = []
    for module, name in ((annotations, "inspect_annotations"), (masks, "read_segmentations")):
        read = getattr(module, name)

        def counted(path, *more, read=read):
            files.append(path.name)
            return read(path, *more)

        monkeypatch.setattr(module, name, counted)
    monkeypatch.setattr(checking, "inspect_annotations", annotations.inspect_annotations)
    return files


def polygons(content):
    for record in content["annotations"]:
        x, y, width, height = record["bbox"]
        record["segmentation"] = [[x, y, x + width, y, x + width / 2, y + height]]


def same(ours: Annotations, theirs: Annotations) -> bool:
    return all(
        np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other
        for mine, its in ((ours, theirs), (ours.truth, theirs.truth))
        for name, one in vars(mine).items()
        if name not in ("index", "truth")
        for other in [getattr(its, name)]
    )


def test_the_second_to_open_a_file_parses_nothing_and_has_all_of_it(tmp_path, parsed):
    split = folders.write(tmp_path, polygons)
    plain, _ = inspect_annotations(split.annotations)
    first, second = CocoDetectionDataset(split), CocoDetectionDataset(split)
    assert parsed == [split.annotations.name]
    assert same(first._all, plain) and same(second._all, plain)
    assert first.fingerprint == second.fingerprint and first.coco.anns == second.coco.anns
    for (image, target), (other, its) in zip(first.with_masks(), second.with_masks(), strict=True):
        assert torch.equal(image, other) and target.keys() == its.keys() and torch.equal(target["masks"], its["masks"])
        assert torch.equal(target["boxes"], its["boxes"]) and torch.equal(target["labels"], its["labels"])
    assert parsed == [split.annotations.name] * 2, "once for boxes, once for masks"


def test_arrays_are_mapped_and_not_in_memory(tmp_path):
    found = CocoDetectionDataset(folders.write(tmp_path))._all
    base = found.boxes
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap) and not found.boxes.flags.writeable


def test_a_changed_file_is_read_anew_though_size_and_time_are_the_same(tmp_path):
    file = write_annotations(tmp_path / "a.json", only(box(1, 20, 90, (5, 6, 10, 8))))
    before = os.stat(file)
    assert open_annotations(file)[0].boxes[0].tolist() == [5, 6, 15, 14]
    file.write_text(file.read_text().replace("[5, 6, 10, 8]", "[5, 7, 10, 8]"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(file).st_size == before.st_size
    assert open_annotations(file)[0].boxes[0].tolist() == [5, 7, 15, 15]


def test_a_file_of_the_same_content_elsewhere_has_the_same_index(tmp_path, parsed):
    for name in ("a.json", "b.json"):
        found, _ = open_annotations(write_annotations(tmp_path / name, only(box(1, 20))))
        assert len(found.boxes) == 1 and found.index.source.name == name
    assert parsed == ["a.json"]


def test_other_code_makes_another_index(tmp_path, parsed, monkeypatch):
    file = write_annotations(tmp_path / "a.json", only(box(1, 20)))
    open_annotations(file)
    monkeypatch.setattr(index, "_code", lambda: "of tomorrow")
    open_annotations(file)
    assert parsed == ["a.json"] * 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: content[:40],
        lambda content: b"other" + content[5:],
        lambda content: content + b"more",
        lambda content: content[:16] + b"\xff" * 100 + content[116:],
    ],
)
def test_a_damaged_index_is_made_anew(tmp_path, parsed, damage):
    file = write_annotations(tmp_path / "a.json", only(box(1, 20)))
    kept = open_annotations(file)[0].index.file
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    assert len(open_annotations(file)[0].boxes) == 1
    assert parsed == ["a.json"] * 2 and kept.read_bytes() == whole


def test_what_is_put_right_is_said_each_time_with_its_number_and_examples(tmp_path):
    boxes = [box(k, 20, 90, (5, 6, 0, 8)) for k in range(1, 6)]
    file = write_annotations(tmp_path / "a.json", only(*boxes, box(9, 20)))
    sentences = [[problem.sentence for problem in open_annotations(file)[1]] for _ in range(2)]
    assert sentences[0] == sentences[1] == [problem.sentence for problem in inspect_annotations(file)[1]]
    assert "5 of 6 boxes without area" in sentences[0][0] and "annotation 3" in sentences[0][0]


def test_strict_refuses_what_the_index_remembers(tmp_path):
    def flat(content):
        content["annotations"][0]["bbox"][2] = 0

    split = folders.write(tmp_path, flat)
    with pytest.warns(Notice, match="without area, left out"):
        CocoDetectionDataset(split)
    with pytest.raises(InputError, match=r"without area, left out.*--strict refuses that"):
        CocoDetectionDataset(type(split)(split.images, split.annotations, split.name, strict=True))


def test_a_file_with_errors_has_no_index(tmp_path, parsed):
    file = write_annotations(tmp_path / "a.json", only(box(1, 20), box(1, 20)))
    assert "stands 2 times" in open_annotations(file)[1][0].sentence == open_annotations(file)[1][0].sentence
    assert parsed == ["a.json"] * 2 and not list((tmp_path / "cache").rglob("*.index"))


@pytest.mark.parametrize("place", ["a file/below", "/proc/nowhere"])
def test_where_no_index_can_be_kept_the_data_open_all_the_same_which_is_said(tmp_path, monkeypatch, place):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("JDKD_CACHE", str(tmp_path / place))
    split = folders.write(tmp_path)
    with pytest.warns(Notice, match="is read anew whenever it is opened.*set JDKD_CACHE to a folder that can be"):
        dataset = CocoDetectionDataset(split)
    assert dataset._all.index is None and len(dataset) == 3
    assert len(pickle.loads(pickle.dumps(dataset))) == 3


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path):
    file = write_annotations(tmp_path / "a.json", only(box(1, 20)))
    looked_at = index.index_of(file, "annotations")
    file.write_text(file.read_text() + " ")
    assert looked_at.write({"a": np.zeros(3)}, {}) is None and not looked_at.file.exists()


def test_a_small_file_has_no_index(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "LEAST_BYTES", 2**20)
    assert open_annotations(write_annotations(tmp_path / "a.json", only(box(1, 20))))[0].index is None
    assert not (tmp_path / "cache").exists()


def test_arrays_of_every_shape_come_back(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("{}")
    arrays = {"a": np.arange(7, dtype=np.int64), "none": np.zeros((0, 4)), "b": np.eye(3, dtype=np.float32) > 0}
    arrays["turned"] = np.arange(6.0).reshape(2, 3).T
    kept = index.index_of(file, "any").write(arrays, {"é": [1, None]})
    assert kept.facts == {"é": [1, None]} and kept.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(kept.arrays[name], array) and kept.arrays[name].dtype == array.dtype


def test_a_worker_is_sent_the_place_of_the_index_alone(tmp_path):
    def many(content):
        polygons(content)
        record = content["annotations"][0]
        content["annotations"] += [{**record, "id": 1000 + k} for k in range(5000)]

    dataset = CocoDetectionDataset(folders.write(tmp_path, many)).with_masks()
    expected = [target["masks"].sum().item() for _, target in dataset]
    sent = pickle.dumps(dataset)
    assert len(sent) < 3000
    again = pickle.loads(sent)
    assert [target["masks"].sum().item() for _, target in again] == expected and len(expected) == 3
    assert again.fingerprint == dataset.fingerprint


@pytest.fixture
def looked_at(monkeypatch):
    """The images whose header was read."""
    names = []

    def counted(path, size, *, decode, verify=checking.verify_image):
        names.append(path.name)
        verify(path, size, decode=decode)

    monkeypatch.setattr(checking, "verify_image", counted)
    return names


def test_images_that_have_not_changed_are_not_looked_at_again(tmp_path, looked_at):
    split = folders.write(tmp_path)
    progress = []
    for _ in range(2):
        CocoDetectionDataset(split, progress=lambda *state: progress.append(state))
    assert sorted(looked_at) == sorted(file.name for file in split.images.iterdir()) and progress[-1] == (3, 3)
    looked_at.clear()
    first = next(split.images.iterdir())
    first.write_bytes(first.read_bytes())  # another time
    CocoDetectionDataset(split)
    assert len(looked_at) == 3


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(file.read_bytes()[:60]),
        Path.unlink,
        lambda file: Image.new("L", (1, 1)).save(file),
    ],
)
def test_an_image_that_was_spoilt_since_is_found(tmp_path, spoil):
    split = folders.write(tmp_path)
    CocoDetectionDataset(split)
    file = sorted(split.images.iterdir())[1]
    spoil(file)
    for _ in range(2):  # what was wrong is not remembered as sound
        with pytest.raises(InputError, match=file.name):
            CocoDetectionDataset(split)


@pytest.mark.slow
@pytest.mark.usefixtures("when_asked")
def test_118000_images_open_in_a_minute_and_then_in_ten_seconds_in_a_gigabyte(tmp_path):
    split = large(tmp_path, *LARGE)
    for limit in (60, 10):
        row = opened(split, tmp_path / "cache")
        print(row)
        assert (row["images"], row["boxes"]) == LARGE
        assert row["processor_seconds"] < limit and row["mib"] < 1000, "of processor, as other processes may be at work"
