"""What is promised after Ctrl-C is what there is."""

import pytest

from jdkd.cli.failures import Interrupted, keeping
from jdkd.cli.flags import TrainingFlags
from jdkd.run_folder import RunFolder


def told(run, flags, write=lambda: None):
    def interrupted():
        with keeping(run, lambda: flags.kept(run.path)):
            write()
            raise KeyboardInterrupt

    with pytest.raises((Interrupted, KeyboardInterrupt)) as caught:
        interrupted()
    return caught.value


@pytest.mark.parametrize("every", [0, 100])
def test_a_training_without_a_checkpoint_promises_none(tmp_path, every):
    run = RunFolder(tmp_path / "out")
    error = told(run, TrainingFlags(checkpoint_every=every), lambda: run.begin("train", {}))
    assert str(error) == f"{run.path} keeps no checkpoint yet, so that it begins anew"


@pytest.mark.parametrize(
    ("every", "words"), [(0, "the last checkpoint"), (7, "the checkpoint of every 7 steps and of the last one")]
)
def test_a_training_with_one_says_which(tmp_path, every, words):
    run = RunFolder(tmp_path)
    run.begin("distill", {})
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "checkpoint.pt").touch()
    assert str(told(run, TrainingFlags(checkpoint_every=every))) == f"{tmp_path} keeps {words}"


def test_before_a_run_has_begun_there_is_nothing_to_carry_on(tmp_path):
    assert type(told(RunFolder(tmp_path / "out"), TrainingFlags())) is KeyboardInterrupt
    assert not (tmp_path / "out").exists()
