"""Which files have tests for a GPU, and which packages they need: read off the sources, nothing is imported."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GPU_TESTS = re.compile(r"mark\.gpu|^OP = ", re.MULTILINE)
FOLDERS = {"jdkd.kernels": ROOT / "kernels"}  # beside the package in a checkout


def test_files() -> list[str]:
    """Test modules that mark tests for a GPU, or run them once a backend; from the root of the checkout."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if GPU_TESTS.search(file.read_text(encoding="utf-8"))]


def missing(file: str, has: Callable[[str], bool]) -> str | None:
    """A package that a test module imports, itself or through our modules, and that is not here.

    Args:
        file: from the root of the checkout.
        has: whether a package is there.
    """
    seen: set[Path] = set()
    todo = [ROOT / file, *(path for folder in Path(file).parents if (path := ROOT / folder / "conftest.py").is_file())]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imports(path):
            package = name.partition(".")[0]
            if package in ("jdkd", "tests", "benchmarks"):
                todo += _files(name)
            elif not has(package):
                return package
    return None


def has(package: str) -> bool:
    """Whether a package is installed here."""
    return importlib.util.find_spec(package) is not None


@functools.cache
def imports(path: Path) -> tuple[str, ...]:
    """What a module imports when it is imported itself, and not under a try: names of modules, and of what is taken
    from them, which may be modules too."""
    return tuple(_imports(ast.parse(path.read_text(encoding="utf-8")).body))


def _imports(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from _imports(node.body)


def _files(name: str) -> list[Path]:
    """The modules that importing one of ours runs: its packages and itself."""
    parts, found = name.split("."), []
    for count in range(1, len(parts) + 1):
        dotted = ".".join(parts[:count])
        folder = next((at / "/".join(parts[2:count]) for stem, at in FOLDERS.items() if dotted.startswith(stem)), None)
        folder = folder or ROOT / "/".join(parts[:count])
        found += [path for path in (folder / "__init__.py", folder.with_suffix(".py")) if path.is_file()]
    return found
