"""Reading annotation files, and what is said of them."""

import pytest

from jdkd.errors import InputError
from jdkd.notices import Notice

from .annotation_files import read_annotations, write_annotations


@pytest.fixture
def read(tmp_path):
    """Writes what it is given as an annotation file, and reads that."""
    return lambda what: read_annotations(write_annotations(tmp_path / "instances.json", what))


@pytest.fixture
def refusal(tmp_path, read):
    """The one sentence with which reading what it is given is refused."""

    def of(what):
        with pytest.raises(InputError) as caught:
            read(what)
        sentence = str(caught.value)
        assert sentence.startswith(f"{tmp_path / 'instances.json'}: "), "the sentence names the file"
        assert "\n" not in sentence and "; " in sentence, "one sentence, with a remedy after the semicolon"
        return sentence

    return of


@pytest.fixture
def repair(tmp_path):
    """What is read from what it is given, and the one sentence that says what was put right."""

    def of(what):
        file = write_annotations(tmp_path / "instances.json", what)
        with pytest.warns(Notice) as said:
            found = read_annotations(file)
        (notice,) = said
        with pytest.raises(InputError, match="; --strict refuses that: correct the file"):
            read_annotations(file, strict=True)
        assert str(notice.message).startswith(f"{file}: ")
        return found, str(notice.message)

    return of
