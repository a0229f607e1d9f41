import json

import pytest

from jdkd.cli.flags import recorded_split
from jdkd.errors import InputError
from jdkd.files import write_whole
from jdkd.run_folder import RunFolder

IDENTITY = {"steps": 10, "data": {"train": "a", "val": "b"}, "sizes": (1, 2)}


def test_begins_finishes_and_is_resumed(tmp_path):
    run = RunFolder(tmp_path / "deep" / "out")
    assert run.begin("search", IDENTITY, command=["jdkd", "search"]) is False
    record = run.read()
    assert record["kind"] == "search" and record["finished"] is None and record["command"] == ["jdkd", "search"]
    assert RunFolder(run.path).begin("search", IDENTITY, resume=True) is True
    run.finish(best=3)
    assert run.read()["finished"] and run.read()["best"] == 3


def test_resume_of_an_empty_folder_begins(tmp_path):
    assert RunFolder(tmp_path).begin("train", {}, resume=True) is False


@pytest.mark.parametrize(
    ("kind", "identity", "resume", "message"),
    [
        ("search", IDENTITY, False, "already holds a run"),
        ("train", IDENTITY, True, "holds a `jdkd search` and cannot be resumed as `jdkd train`"),
        ("search", {**IDENTITY, "steps": 20}, True, "steps was 10 and is 20"),
        ("search", {**IDENTITY, "data": {"train": "a", "val": "c"}}, True, r'data\.val was "b" and is "c"'),
        (
            "search",
            {**IDENTITY, "more": None, "sizes": [1, 2, 3]},
            True,
            r"sizes was \[1, 2\] and is \[1, 2, 3\]",
        ),
    ],
)
def test_refuses_and_leaves_the_record(tmp_path, kind, identity, resume, message):
    RunFolder(tmp_path).begin("search", IDENTITY)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(InputError, match=message):
        RunFolder(tmp_path).begin(kind, identity, resume=resume)
    assert (tmp_path / "run.json").read_bytes() == before


@pytest.mark.parametrize("content", [[1, 2], {"identity": []}, {"where": 3}])
def test_a_record_that_is_none_is_refused(tmp_path, content):
    RunFolder(tmp_path).begin("train", {})
    record = content if isinstance(content, list) else RunFolder(tmp_path).read() | content
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="not the record of a run"):
        RunFolder(tmp_path).begin("train", {}, resume=True)
    assert recorded_split(tmp_path, "val", False) is None


@pytest.mark.parametrize("content", ["[1, 2]", "no JSON", '{"name": "an experiment of another program"}'])
def test_the_record_of_another_program_says_nothing_of_data(tmp_path, content):
    student, images = tmp_path / "student", tmp_path / "images"
    for folder in (student, images):
        folder.mkdir()
    (tmp_path / "run.json").write_text(content)
    assert recorded_split(student, "val", False) is None
    run = RunFolder(student)
    run.begin("train", {}, where={"data": {"val_images": str(images), "val_annotations": str(tmp_path / "run.json")}})
    assert recorded_split(student, "val", False).images == images


def test_withdraws_only_what_is_empty(tmp_path):
    run = RunFolder(tmp_path / "out")
    run.begin("train", {})
    (run.path / "log.jsonl").write_text("")
    run.withdraw()
    assert run.file.is_file()
    (run.path / "log.jsonl").unlink()
    run.withdraw()
    assert not run.path.exists()


def test_withdraws_neither_the_run_of_another_nor_a_folder_that_was_there(tmp_path):
    RunFolder(tmp_path).begin("train", {})
    other = RunFolder(tmp_path)
    with pytest.raises(InputError):
        other.begin("train", {})
    other.withdraw()
    assert other.file.is_file()
    other.file.unlink()
    other.begin("train", {})
    other.withdraw()
    assert tmp_path.is_dir() and not other.file.exists()


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    write_whole(file, "before")

    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match=r"cannot write .*result\.json \(No space left on device\)"):
        write_whole(file, json.dumps(IDENTITY))
    assert file.read_text() == "before" and [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_a_folder_in_the_place_of_the_record_is_named(tmp_path):
    (tmp_path / "run.json").mkdir()
    with pytest.raises(InputError, match=r"run\.json is a folder, so .* is not the folder of a run"):
        RunFolder(tmp_path).begin("train", {})
