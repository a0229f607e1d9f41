"""Pages of the site that lie elsewhere in the repository, and links that lead out of ``docs/``: see the two functions,
which mkdocs calls."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {  # files of the repository that are pages of the site
    "CONTRIBUTING.md": "design/rules.md",
    "CHANGELOG.md": "design/changes.md",
    "kernels/README.md": "design/triton.md",
    "csrc/README.md": "design/cuda.md",
    "examples/README.md": "examples.md",
    "benchmarks/results/topology.md": "experiments/topology.md",
}
SOURCE = {page: file for file, page in ELSEWHERE.items()}
LINK = re.compile(r"(!?)\[([^\]]+)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[\w.-]+)?\)")


def on_files(files, config):
    """Adds the pages that lie elsewhere."""
    for file, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns each link between files of the repository into one between pages; what is no page keeps its text alone."""
    here = page.file.src_uri
    return LINK.sub(lambda link: rewritten(link, SOURCE.get(here, f"docs/{here}"), here), markdown)


def rewritten(link, source, page):
    """One link, of a file of the repository that is this page of the site."""
    mark, text, target, part = link.groups()
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if not (ROOT / file).exists():
        raise FileNotFoundError(f"{source} links to {target}, which is not there")
    there = ELSEWHERE.get(file, file.removeprefix("docs/") if file.startswith("docs/") else None)
    if there is None:
        return text if mark == "" else ""
    return f"{mark}[{text}]({posixpath.relpath(there, posixpath.dirname(page) or '.')}{part or ''})"
