"""The examples of README and docs run as they stand, and their commands are ones that the command line takes."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks import headlines, record
from benchmarks.readme import MADE, PAGES, ROOT, drawings, rendered
from jdkd.cli import _parse

TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
ALL = "\n".join(TEXTS.values())
EXAMPLES = [
    pytest.param(example, id=f"{name} {number}")
    for name, text in TEXTS.items()
    for number, example in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL), 1)
]
LINES = [  # of the shell, on all pages
    line
    for text in TEXTS.values()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
COMMANDS = sorted(
    {shlex.join(shlex.split(part, comments=True)) for line in LINES for part in line.split(" && ")} - {""}
)


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_runs(example, capsys):
    exec(compile(example, "an example", "exec"), {})
    assert capsys.readouterr().out


def test_the_front_page_is_short_and_has_an_example_for_each_kind_of_user():
    assert len(TEXTS["README.md"].splitlines()) <= 130 and TEXTS["README.md"].count("```python") >= 2
    shown = {command.split()[1] for command in COMMANDS if command.startswith("jdkd ")}
    assert {"train", "search", "eval", "latency", "inspect", "import", "export", "distill"} <= shown
    for page, text in TEXTS.items():
        for name in re.findall(r"\]\((?!http)([\w/.-]+)\)", text):
            assert ((ROOT / page).parent / name).exists(), f"{page}: {name}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_is_shown_is_taken(command):
    first, *words = shlex.split(command)
    if first == "torchrun":
        place = words.index("-m")
        assert words[place + 1] == "jdkd"
        first, words = "jdkd", words[place + 2 :]
    if first == "python" and words[0] == "-m" and words[1] == "jdkd":
        first, words = "jdkd", words[2:]
    if first == "jdkd":
        assert callable(_parse(words))
    elif first == "python":
        name = words[1] if words[0] == "-m" else words[0].removesuffix(".py").replace("/", ".")
        assert (ROOT / f"{name.replace('.', '/')}.py").exists(), name
    elif first == "make":
        assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text()
    else:
        assert first == "pip" and words[0] == "install", f"what is {first}?"


@pytest.mark.parametrize("page", PAGES, ids=TEXTS)
def test_no_example_is_out_of_the_tests_sight(page):
    """What is fenced is a command, Python that is run, or a file of the examples, which tests run."""
    fences = re.findall(r"^``` ?(\S.*)$", page.read_text(), re.MULTILINE)
    for fence in fences:
        title = re.fullmatch(r"\{ \.python title=\"(examples/\w+\.py)\" \}", fence)
        assert fence in ("bash", "python") or (title and Path(ROOT, title[1]).exists()), f"{page}: {fence}"


@pytest.mark.parametrize("page", PAGES, ids=TEXTS)
def test_every_table_says_what_the_result_files_say(page):
    assert rendered(page.read_text()) == page.read_text()


def test_every_drawing_shows_what_the_result_files_say():
    assert {file: file.read_text() for file in (ROOT / "docs").rglob("*.svg")} == drawings()


def test_every_result_file_is_shown_by_a_page_and_so_is_what_is_read_off_the_code():
    shown = set(re.findall(r"<!-- results of (\w+) -->", ALL))
    assert {file.stem for file in record.RESULTS.glob("*/*.jsonl")} - shown == {"tuned"}, "which `backends` shows"
    assert {*MADE, headlines.OP} <= shown
