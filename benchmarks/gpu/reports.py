"""A plugin of pytest: a row for every test as soon as it is done, and a new worker where a test lost the device."""

from __future__ import annotations

import json
import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", help="append a row for every test to this file")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Worker())
    elif config.getoption("rows"):
        config.pluginmanager.register(Rows(config.getoption("rows")))


class Rows:
    """Writes rows, in the process that hears of every test.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._add(report, report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._add(report, 0.0)

    def _add(self, report: pytest.TestReport | pytest.CollectReport, seconds: float) -> None:
        why = "" if report.outcome == "passed" else str(report.longrepr)[-2000:]
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(seconds, 3), "why": why}
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


class Worker:
    """In a worker of xdist: one whose device takes no more calls ends, and another one runs what is left."""

    def __init__(self) -> None:
        self.failed = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo):
        report = yield
        self.failed = self.failed or report.failed
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.failed and _lost():
            os._exit(1)
        self.failed = False


def _lost() -> bool:
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
