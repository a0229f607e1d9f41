import json
from contextlib import closing

import pytest

from jdkd.detect import load
from jdkd.run_folder import RunFolder
from jdkd.search.archive import Archive
from jdkd.search.timing import Timing

ENTRY = {
    "map": 0.4,
    "map50": 0.6,
    "latency_ms": {"p50": 10.0, "p90": 11.0, "p99": 12.0},
    "latency_ratio_interval": [0.49, 0.51],
    "params": 1000,
    "gmacs": 0.1,
    "train_steps": 3,
}


@pytest.fixture
def pretend(monkeypatch):
    """A search that ends at once: `pretend(ratio)` or `pretend(error)`; returns the configurations it was given."""
    configs = []

    def as_found(outcome):
        def search(config, progress):
            configs.append(config)
            known = load(config.base).architecture
            environment = {"device": "cpu", "device_name": "a cpu", "threads": 1, "torch": "2.11"}
            environment |= {"runtime": "eager", "runtime_version": "2.11"}
            timing = Timing(known.id, "brief", environment, (20.0, 20.0), (20.0, 20.0))
            base = {
                "number": 0, "id": "000", "parent": None, "kind": "base", "action": "base", "teacher": None,
                "architecture": known, "architecture_id": known.id, "generation": 0, "target": None,
                "map": 0.4, "map50": 0.6, "steps": 0, "lineage_steps": 0,
                "cycles": (), "params": 1000, "gmacs": 0.1, "seconds": {"scoring": 1.0},
            }  # fmt: skip
            run = RunFolder(config.out)
            run.begin("search", {"seed": config.seed}, resume=config.resume, command=config.command)
            with closing(Archive(config.out / "archive.sqlite")) as archive:
                if not archive.candidates:
                    archive.add(timing, **base)
            progress("candidates", 1, 1, {"mAP": 0.4})
            if isinstance(outcome, BaseException):
                raise outcome
            result = {
                "base": {**ENTRY, "latency_ratio": 1.0},
                "students": [
                    {**ENTRY, "latency_ratio": outcome, "target": target, "target_met": outcome <= target}
                    | {"id": "000", "folder": "student" if len(config.targets) == 1 else f"student-{target:g}"}
                    for target in config.targets
                ],
                "target_map": config.target_map,
                "target_met": outcome <= min(config.targets),
            }
            (config.out / "result.json").write_text(json.dumps(result))
            run.finish()
            return result

        monkeypatch.setattr("jdkd.search.search", search)
        return configs

    return as_found


@pytest.fixture
def arguments(trained, squares, tmp_path):
    return ["search", "--base", trained, "--data", squares, "--out", tmp_path / "out", "--steps", 40]


def test_ends_with_a_table_a_report_and_the_paths(jdkd, pretend, arguments, tmp_path):
    configs = pretend(0.5)
    answer = jdkd(*arguments, "--seed", 3, "--device", "cpu")
    assert answer.code == 0, answer.err
    (config,) = configs
    assert (config.steps, config.seed, config.device, config.targets) == (40, 3, "cpu", (0.53,))
    assert config.selection is None and config.command[:2] == ("jdkd", "search") and "40" in config.command
    for name in ("student", "result.json", "archive.sqlite", "pareto.png", "report.html"):
        assert str(tmp_path / "out" / name) in answer.out
    assert (tmp_path / "out" / "pareto.png").is_file() and (tmp_path / "out" / "report.html").is_file()
    assert "0.500 (0.490–0.510)" in answer.out
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"]


def test_a_target_that_is_missed_is_said_after_everything_is_written(jdkd, pretend, arguments, tmp_path):
    pretend(0.7)
    answer = jdkd(*arguments)
    assert answer.code == 2
    assert "takes 0.700 of the base's time and misses the 0.53 that was asked for" in answer.err
    assert (tmp_path / "out" / "report.html").is_file()


def test_ctrl_c_keeps_the_archive_and_gives_the_command_to_carry_on(jdkd, pretend, arguments, tmp_path):
    pretend(KeyboardInterrupt())
    answer = jdkd(*arguments)
    assert answer.code == 2 and "Traceback" not in answer.err
    command = " ".join(map(str, ["jdkd", *arguments, "--resume"]))
    assert answer.err.strip().endswith(
        f"keeps every finished candidate and the last checkpoint; carry on with: {command}"
    )
    pretend(0.5)
    assert jdkd(*arguments).code == 2
    assert jdkd(*arguments, "--resume").code == 0


def test_a_full_disk_in_the_middle(jdkd, pretend, arguments, tmp_path):
    import sqlite3

    pretend(sqlite3.OperationalError("database or disk is full"))
    answer = jdkd(*arguments)
    assert answer.code == 2 and "disk is full" in answer.err and str(tmp_path / "out") in answer.err


def test_images_to_select_on_are_given_by_both_flags(jdkd, pretend, arguments, squares, tmp_path):
    configs = pretend(0.5)
    flags = {"--selection-images": squares / "val2017", "--selection-annotations": squares / "annotations"}
    for flag, value in flags.items():
        (other,) = flags.keys() - {flag}
        answer = jdkd(*arguments, flag, value)
        assert answer.code == 2 and f"{flag} is given without {other}; give both" in answer.err
    missing = squares / "annotations" / "missing.json"
    answer = jdkd(*arguments, "--selection-images", squares / "val2017", "--selection-annotations", missing)
    assert answer.code == 2 and f"{missing} does not exist" in answer.err and "--selection-annotations" in answer.err
    assert not configs and not (tmp_path / "out").exists()
    annotations = squares / "annotations" / "instances_val2017.json"
    assert jdkd(*arguments, "--selection-images", squares / "val2017", "--selection-annotations", annotations).code == 0
    (config,) = configs
    assert (config.selection.images, config.selection.annotations) == (squares / "val2017", annotations)


def test_a_selection_of_images_that_report_is_refused_before_anything_is_written(jdkd, arguments, squares, tmp_path):
    flags = "--selection-images", squares / "val2017", "--selection-annotations"
    answer = jdkd(*arguments, *flags, squares / "annotations" / "instances_val2017.json")
    assert answer.code == 2 and "Traceback" not in answer.err
    assert "all 4 images" in answer.err and "are validation images, which report too" in answer.err
    assert not (tmp_path / "out").exists()


def test_every_flag_arrives_in_the_search(jdkd, pretend, arguments, squares, tmp_path):
    configs = pretend(0.3)
    flags = ["--targets", "0.75,0.53,0.35", "--target-map", 0.2, "--workers", 2, "--no-control", "--loaders", 1]
    flags += ["--teachers", squares, tmp_path, "--teacher-pool", tmp_path, "--candidates", 4, "--proposals", 5]
    answer = jdkd("search", "--base", arguments[2], *arguments[3:-2], "--minutes", 2.5, *flags)
    assert answer.code == 0, answer.err
    (config,) = configs
    assert config.targets == (0.75, 0.53, 0.35) and config.target_map == 0.2 and config.minutes == 2.5
    assert (config.workers, config.loaders, config.control, config.steps, config.ray) == (2, 1, False, None, None)
    assert config.teachers == (squares, tmp_path) and config.teacher_pool == tmp_path
    assert (config.candidates, config.proposals) == (4, 5)
    assert all(str(tmp_path / "out" / f"student-{target}") in answer.out for target in (0.75, 0.53, 0.35))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--targets", "0.75;0.5"], "--targets is '0.75;0.5'; give fractions such as 0.75,0.53,0.35."),
        (["--targets", "75,53"], "targets are fractions of the base's latency"),
        (["--targets", "0.7,0.5", "--target-latency", "0.5"], "--targets and --target-latency are both given"),
        (["--target-latency", "53"], "got [53.0]"),
        (["--target-map", "41"], "target_map is an mAP and must be in (0, 1), got 41.0."),
        (["--epochs", "3"], "steps and epochs are given"),
        (["--workers", "-1"], "workers must be a number of at least 0, got -1"),
        (["--workers", "2", "--ray", "auto"], "workers and ray are both given"),
        (["--steps", "2"], "the budget is 2 steps, too few"),
        (["--teachers", "nowhere"], "nowhere"),
    ],
)
def test_a_flag_that_makes_no_sense_gets_one_sentence(jdkd, arguments, tmp_path, flags, says):
    answer = jdkd(*arguments, *flags)
    assert answer.code == 2 and says in answer.err and "Traceback" not in answer.err
    assert not (tmp_path / "out").exists()


def test_help_says_what_every_flag_does(jdkd):
    answer = jdkd("search", "--help")
    words = " ".join(answer.out.replace("\u2502", " ").split())
    assert answer.code == 0
    for flag in ("--targets", "--target-map", "--minutes", "--workers", "--ray", "--teachers", "--no-control"):
        assert flag in words
    assert "a student for each" in words and "--no-control Leave out the control" in words


def test_events_of_the_search_are_written(jdkd, pretend, arguments, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretend(0.5)
    assert jdkd(*arguments, "--tensorboard").code == 0
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard" / "search")).Reload()
    assert [(each.step, round(each.value, 3)) for each in events.Scalars("candidates/mAP")] == [(0, 0.4)]
    assert len(events.Images("front")) == 1
