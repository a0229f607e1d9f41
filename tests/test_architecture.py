"""The rules of the house that a machine can check: floors, where packages are imported, sizes, names."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    "errors files notices run_folder",
    "kernels reference",
    "_ext",
    "_backend",
    "ops",
    "functional env testing",
    "nn",
    "graph",
    "rewrite",
    "patch",
    "detect data",
    "train distill latency",
    "pool morph",
    "search",
    "report",
    "cli __main__",
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
OPTIONAL = {"tyro", "rich", "matplotlib", "ray", "onnx", "sklearn"}
NOT_AT_IMPORT = OPTIONAL | {"triton", "torchvision", "pycocotools", "safetensors", "PIL", "numba", "pandas"}
NAMELESS = {"utils", "util", "helpers", "helper", "misc", "common"}
MAX_LINES = 400


def imports(tree: ast.Module, package: str) -> Iterator[tuple[str, int, bool]]:
    """Yields every imported module: dotted name, line, and whether it is imported inside a function."""

    def names(node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
            return [f"{base}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            name = node.args[0]
            return [name.value] if isinstance(name, ast.Constant) else []
        return []

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, int, bool]]:
        for name in names(node):
            yield name, node.lineno, inside
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            if not (isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")):
                yield from walk(child, inside)

    return walk(tree, False)


def room_of(name: str) -> str | None:
    """The room of ``jdkd.<room>.…``; None for anything else and for attributes of the package itself."""
    parts = name.split(".")
    is_room = parts[0] == "jdkd" and len(parts) > 1 and not parts[1].startswith("__") and parts[1] != "_C"
    return parts[1] if is_room else None


def import_violations(root: Path) -> list[str]:
    """Every import in ``root/jdkd`` and ``root/kernels`` that the rules forbid: ``file:line: sentence``."""
    found = []
    for path in sorted([*root.glob("jdkd/**/*.py"), *root.glob("kernels/*.py")]):
        parts = path.relative_to(root).with_suffix("").parts
        home = "kernels" if parts[0] == "kernels" else parts[1]
        package = ".".join(parts[:-1])
        for name, line, inside in imports(ast.parse(path.read_text()), package):
            for sentence in judge(home, name, inside):
                found.append(f"{path.relative_to(root)}:{line}: {sentence}")
        if home not in FLOOR_OF and home != "__init__":
            found.append(f"{path.relative_to(root)}: the room {home} has no floor")
    return found


def judge(home: str, name: str, inside: bool) -> Iterator[str]:
    """Yields what is wrong with importing ``name`` from the room ``home``."""
    top, room = name.split(".")[0], room_of(name)
    if home == "kernels":
        if top not in {"torch", "triton", "kernels", *sys.stdlib_module_names}:
            yield f"kernels import only torch, triton and each other, not {name}"
        return
    if room in FLOOR_OF and FLOOR_OF[room] > FLOOR_OF.get(home, -1):
        yield f"{home} is on a floor left of {room}, and may not import {name}"
    if top == "triton" and not (home == "ops" and inside):
        yield "triton is imported only inside functions of ops"
    if name.startswith("jdkd._C") and home != "_ext":
        yield "jdkd._C is imported only in _ext.py"
    if top in OPTIONAL and not inside:
        yield f"the optional package {top} is imported where it is used, not at the top of a file"
    if top == "kernels":
        yield "kernels is imported as jdkd.kernels"


def source_files() -> list[Path]:
    folders = ("jdkd", "kernels", "csrc", "tests", "benchmarks")
    suffixes = {".py", ".cpp", ".cu", ".h", ".cuh", ".sh"}
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    return [ROOT / "setup.py", *sorted(files)]


def test_imports_keep_to_the_floors_and_rooms():
    assert import_violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("jdkd/ops/pearson.py", "from jdkd.nn import PKDLoss", "ops is on a floor left of nn"),
        ("jdkd/ops/pearson.py", "def f():\n    from ..search import run", "ops is on a floor left of search"),
        ("jdkd/ops/pearson.py", "import triton", "only inside functions of ops"),
        ("jdkd/ops/pearson.py", "from jdkd import cli", "ops is on a floor left of cli"),
        ("jdkd/latency/measure.py", "def f():\n    import triton.testing", "only inside functions of ops"),
        ("jdkd/ops/pearson.py", "from jdkd import _C", "only in _ext.py"),
        ("jdkd/nn/loss.py", "importlib.import_module('jdkd._C')", "only in _ext.py"),
        ("jdkd/report/html.py", "try:\n    import matplotlib.pyplot\nexcept ImportError: ...", "matplotlib"),
        ("jdkd/data/digits.py", "from sklearn.datasets import load_digits", "sklearn"),
        ("jdkd/ops/pearson.py", "from kernels import pearson", "as jdkd.kernels"),
        ("kernels/pearson.py", "import numpy", "kernels import only"),
        ("kernels/pearson.py", "from jdkd.errors import InputError", "kernels import only"),
        ("jdkd/attic.py", "import torch", "no floor"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path, file, line, expected):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    (violation,) = import_violations(tmp_path)
    assert violation.startswith(file) and expected in violation


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("jdkd/ops/pearson.py", "def f():\n    import triton\n    from jdkd.kernels import pearson"),
        ("jdkd/nn/loss.py", "from jdkd import functional\nfrom jdkd.nn import linear\nfrom . import linear"),
        ("jdkd/cli.py", "from jdkd import __version__\ndef main():\n    import tyro"),
        ("jdkd/_ext.py", "import importlib\nimportlib.import_module('jdkd._C')"),
        ("kernels/pearson.py", "import math\nimport triton.language as tl\nimport torch"),
    ],
)
def test_what_is_allowed_is_not_reported(tmp_path, file, line):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert import_violations(tmp_path) == []


@pytest.mark.parametrize(
    "modules",
    ["jdkd, jdkd.cli", "jdkd.functional, jdkd.nn"],
)
def test_importing_the_package_loads_nothing_heavy(modules):
    script = f"import sys, {modules}; print(*sorted({NOT_AT_IMPORT!r}.intersection(sys.modules)))"
    command = [sys.executable, "-c", script]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (answer.returncode, answer.stdout.strip()) == (0, ""), answer.stderr


def test_files_are_small():
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in source_files()}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_files_have_names_that_say_something():
    nameless = [path for path in source_files() if NAMELESS & {path.stem, path.parent.name}]
    assert [path for path in nameless if (ROOT / "csrc/common") not in path.parents] == []


def test_kernels_is_no_package_of_its_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()
