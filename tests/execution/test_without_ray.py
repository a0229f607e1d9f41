"""What is said where Ray is not installed."""

import sys

import pytest

from jdkd.errors import InputError
from jdkd.execution import executor


def test_a_package_that_is_missing_is_named(task, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"ray is 'auto', and the package ray is not installed.*jdkd\[ray\]"):
        executor(task, "cpu", ray="auto")
