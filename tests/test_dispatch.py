"""One rule picks among several implementations: the first that does not say why not."""

from collections.abc import Callable
from typing import NamedTuple

import pytest

from jdkd import _dispatch
from jdkd.ops import elastic_kernels, elastic_levels_kernels, pearson_forms


class Row(NamedTuple):
    name: str
    why_not: Callable[[int], str | None]
    why: str = ""


UNCHECKED = Row("unchecked", lambda call: _dispatch.NOT_YET)
SMALL = Row("small", lambda call: None if call < 10 else "it takes less than 10")
ANY = Row("any", lambda call: None)


def test_the_first_row_that_takes_a_call_is_picked():
    assert _dispatch.first([SMALL, ANY], 9) == (SMALL, True)
    assert _dispatch.first([SMALL, ANY], 10) == (ANY, True)
    assert _dispatch.first([SMALL], 10) == (None, True)


def test_what_comes_after_an_unchecked_row_is_asked_again():
    assert _dispatch.first([UNCHECKED, SMALL, ANY], 10) == (ANY, False)
    assert _dispatch.first([SMALL, UNCHECKED, ANY], 9) == (SMALL, True)


def test_every_other_row_says_why_not():
    assert _dispatch.explain([SMALL, ANY], 10) == (ANY, (("small", "it takes less than 10"),))
    assert _dispatch.explain([SMALL, ANY], 9) == (SMALL, (("any", "small comes first"),))


@pytest.mark.parametrize(
    "table",
    [elastic_kernels.KERNELS, elastic_levels_kernels.KERNELS, pearson_forms.FORMS],
    ids=["conv", "levels", "pearson"],
)
def test_the_tables_name_each_row_once_and_say_why(table):
    assert len({row.name for row in table}) == len(table) and all(row.why and row.when for row in table)


def test_a_form_says_why_it_does_not_compute_a_call():
    call = pearson_forms.LossCall([], [], tap=True)
    row, others = _dispatch.explain(pearson_forms.FORMS, call)
    assert row.name == "tap" and others[-1] == ("split", "tap comes first")
    assert dict(others)["moments"] == "it takes a padding mask, or statistics over several processes"
