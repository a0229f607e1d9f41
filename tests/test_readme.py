"""The examples of README and docs run as they stand, and their commands exist."""

import re

import pytest

from benchmarks.readme import EXPERIMENTS, PAGES, ROOT, drawings, rendered
from jdkd.cli import main

TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
ALL = "\n".join(TEXTS.values())
EXAMPLES = [
    pytest.param(example, id=f"{name} {number}")
    for name, text in TEXTS.items()
    for number, example in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL), 1)
]
COMMANDS = sorted(set(re.findall(r"^jdkd (pool \w+|\w+)", ALL, re.MULTILINE)))


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_runs(example, capsys):
    exec(compile(example, "an example", "exec"), {})
    assert capsys.readouterr().out


def test_the_front_page_is_short_and_has_an_example_for_each_kind_of_user():
    assert len(TEXTS["README.md"].splitlines()) <= 150 and TEXTS["README.md"].count("```python") >= 2
    assert {"train", "search", "eval", "latency", "inspect", "import"} <= set(COMMANDS)
    for page, text in TEXTS.items():
        for name in re.findall(r"\]\((?!http)([\w/.-]+)\)", text):
            assert ((ROOT / page).parent / name).exists(), f"{page}: {name}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_that_is_shown_exists(command, capfd):
    shown = re.findall(rf"^jdkd {command}((?:.*\\\n)*.*)$", ALL, re.MULTILINE)
    flags = {flag for text in shown for flag in re.findall(r"(--[\w-]+)", text.split("#")[0])}
    helped = [command, "digits"] if command == "data" else command.split()
    with pytest.raises(SystemExit):
        main([*helped, "--help"])
    assert flags <= set(re.findall(r"--[\w-]+", capfd.readouterr().out)), flags


@pytest.mark.parametrize("page", PAGES, ids=TEXTS)
def test_every_table_says_what_the_result_files_say(page):
    assert rendered(page.read_text()) == page.read_text()


def test_every_drawing_shows_what_the_result_files_say():
    assert {file: file.read_text() for file in EXPERIMENTS.glob("*.svg")} == drawings()


def test_no_table_is_lost():
    assert ALL.count("<!-- results of") == 16
