"""The site: every page is in its navigation, and it is built without a warning."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_public import NAMES

ROOT = Path(__file__).resolve().parents[1]
IN_NAVIGATION = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)


def test_every_page_is_in_the_navigation_once():
    pytest.importorskip("mkdocs")
    sys.path.insert(0, str(ROOT / "docs" / "hooks"))
    try:
        from pages import ELSEWHERE
    finally:
        sys.path.pop(0)
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(IN_NAVIGATION) == sorted(written | set(ELSEWHERE.values()))


@pytest.mark.slow
@pytest.mark.usefixtures("when_asked")
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0 and "WARNING" not in answer.stderr, answer.stderr
    pages = {path.relative_to(tmp_path).with_suffix(".md").as_posix() for path in tmp_path.rglob("*.html")}
    assert set(IN_NAVIGATION) <= pages
    api = (tmp_path / "api.html").read_text()
    missing = [".".join(each) for each in NAMES if f'id="jdkd.{each[0]}.{each[1]}"' not in api]
    assert not missing and ":func:" not in api and ":class:" not in api
