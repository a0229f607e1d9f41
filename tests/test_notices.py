"""What is said once."""

import pytest

from jdkd import cli
from jdkd.notices import Notice, say_once


def test_a_notice_is_said_once_for_every_key():
    def thrice():
        for count in range(3):
            say_once(f"{count} boxes were dropped", key="boxes")
            say_once("three levels were left out")

    with pytest.warns(Notice) as told:
        thrice()
    assert [str(notice.message) for notice in told] == ["0 boxes were dropped", "three levels were left out"]


def test_the_command_line_prints_a_notice_as_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_parse", lambda argv: lambda: say_once("two boxes\n were dropped"))
    assert cli.main([]) == 0
    assert capsys.readouterr().err == "jdkd: two boxes were dropped\n"
