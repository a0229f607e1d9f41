"""The README's examples run as they stand, and its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.readme import rendered

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted(set(re.findall(r"^jdkd (\w+)", README, re.MULTILINE)))


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_every_example_runs(number, capsys):
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {})
    assert capsys.readouterr().out


def test_there_is_an_example_for_each_kind_of_user():
    assert len(EXAMPLES) == 7 and {"train", "search", "eval", "latency", "inspect"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_that_the_readme_shows_exists(command):
    shown = re.findall(rf"^jdkd {command}((?:.*\\\n)*.*)$", README, re.MULTILINE)
    flags = {flag for text in shown for flag in re.findall(r"(--[\w-]+)", text.split("#")[0])}
    helped = [command, "digits"] if command == "data" else [command]
    text = subprocess.run([sys.executable, "-m", "jdkd", *helped, "--help"], capture_output=True, text=True, check=True)
    assert flags <= set(re.findall(r"--[\w-]+", text.stdout)), flags


def test_every_table_says_what_the_result_files_say():
    assert rendered(README) == README
    assert README.count("<!-- results of") == 5
