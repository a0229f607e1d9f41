import itertools

import pytest

from tests.execution.fake_task import FakeTask

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    for name in ("out", "marks", "base"):
        (folder / name).mkdir()
    (folder / "base" / "content.txt").write_text("weights of the base")
    return FakeTask(folder / "out", folder / "marks", {"base": folder / "base"})


@pytest.fixture
def jobs_of():
    """Makes jobs with the given fates, each with a number of its own."""
    return lambda *fates, **more: [{"number": next(_numbers), "fate": fate, **more} for fate in fates]
