"""The rules of the house that a machine can check: floors, where packages are imported, sizes, names."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    "errors files notices run_folder presets",
    "kernels reference",
    "_ext",
    "_backend _dispatch _tuned _verdicts",
    "ops",
    "functional env testing check execution",
    "nn",
    "graph",
    "rewrite",
    "detect data",
    "train distill latency export",
    "patch",
    "tune",
    "pool morph",
    "search",
    "report",
    "cli __main__",
    "experimental",  # so nothing imports from it
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
OPTIONAL = {"tyro", "rich", "matplotlib", "ray", "sklearn", "optuna", "sqlalchemy", "tensorboard", "pandas"}
OPTIONAL |= {"onnx", "onnxruntime"}
NOT_AT_IMPORT = OPTIONAL | {"triton", "torchvision", "pycocotools", "faster_coco_eval", "safetensors", "PIL", "numba"}
NAMELESS = {"utils", "util", "helpers", "helper", "misc", "common"}
MAX_LINES = 400
FAMILIES = re.compile(  # detectors and what is in them, as words of an identifier or of a sentence
    r"(?<![a-z0-9])("
    r"(faster|mask|keypoint|generalized)[_ ]?r-?cnn|retina_?net|fcos|ssd(_?lite)?(300|320|512)?"
    r"|region_?proposal_?network|rpn|ro_?i_?heads|(box|mask|keypoint)_(head|predictor|roi_pool)|cls_score"
    r"|classification_head|anchor_generator|fpn|feature_?pyramid_?network|layer[1-4]|backbone\.body"
    r"|torchvision\.models\.detection)(?![a-z0-9])",
    re.IGNORECASE,
)
FLAGS = {"fpn", "box_head"}  # of the command line: the user's own words
HUMPS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # where words of CamelCase meet


def imports(tree: ast.Module, package: str) -> Iterator[tuple[str, int, bool]]:
    """Yields every imported module: dotted name, line, and whether that is inside a function or for type checkers."""

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
            checked = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
            yield from walk(child, inside or (checked and child in node.body))

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


def modules_of(root: Path) -> dict[str, Path]:
    """The modules of the package, by dotted name; a package is the module of its ``__init__``."""
    found = {}
    for path in sorted([*root.glob("jdkd/**/*.py"), *root.glob("kernels/*.py")]):
        parts = path.relative_to(root).with_suffix("").parts
        parts = ("jdkd", *parts) if parts[0] == "kernels" else parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def import_graph(root: Path) -> dict[str, set[str]]:
    """Which modules of the package every module of it imports, wherever in its file and for whatever purpose."""
    modules = modules_of(root)
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        for imported, _, _ in imports(ast.parse(path.read_text()), package):
            while imported and imported not in modules:  # an attribute of a module
                imported = imported.rpartition(".")[0]
            if imported:
                graph[name].add(imported)
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The sets of nodes that reach each other; a node that names itself is one."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [*graph[start]]
        while waiting:
            if (node := waiting.pop()) not in found:
                found.add(node)
                waiting += graph[node]
        return found

    reach = {node: reached(node) for node in graph}
    return sorted({tuple(sorted({b for b in reach[a] if a in reach[b]})) for a in graph if a in reach[a]})


def room_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same of rooms; the package's own ``__init__`` names them all and is none."""
    rooms: dict[str, set[str]] = {room: set() for name in graph if (room := room_of(name))}
    for name, imported in graph.items():
        for room in filter(None, map(room_of, imported)):
            if (home := room_of(name)) and home != room:
                rooms[home].add(room)
    return rooms


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
    if name.startswith("jdkd._C"):
        yield "jdkd._C is no Python module: jdkd._ext loads it"
    if top in OPTIONAL and not inside:
        yield f"the optional package {top} is imported where it is used, not at the top of a file"
    if top == "kernels":
        yield "kernels is imported as jdkd.kernels"


def command_line_readers(root: Path) -> list[str]:
    """Where ``sys.argv`` is read outside of the command line: ``file:line``."""
    found = []
    for path in sorted(root.glob("jdkd/**/*.py")):
        if path.relative_to(root).parts[1] not in ("cli", "__main__.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
                by_name = isinstance(node, ast.ImportFrom) and node.module == "sys" and {"argv", "orig_argv"} & {*names}
                read = isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.argv", "sys.orig_argv")
                if read or by_name:
                    found.append(f"{path.relative_to(root)}:{node.lineno}")
    return found


def family_names(root: Path) -> list[str]:
    """Where a detector's family, or a path into one, is named outside of detect: ``file:line: the name``.

    Sentences count where the program says them, and not in docstrings (what follows a field among them, which is help).
    """
    found = []
    for path in sorted(root.glob("jdkd/**/*.py")):
        if path.relative_to(root).parts[1] != "detect":
            tree = ast.parse(path.read_text())
            bare = (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))
            said = {id(node) for node in bare if isinstance(node, ast.Constant)}
            flags = FLAGS if path.relative_to(root).parts[1] == "cli" else set()
            for node in ast.walk(tree):
                for name in [] if id(node) in said else sorted(set(words(node)) - flags):
                    found.append(f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}: {name}")
    return found


def words(node: ast.AST) -> Iterator[str]:
    """Yields the names of families in the identifiers or the text of one node of a syntax tree."""
    texts = [value for _, value in ast.iter_fields(node) if isinstance(value, str)]
    if isinstance(node, ast.Attribute):
        texts = [ast.unparse(node)] if isinstance(node.value, ast.Name | ast.Attribute) else texts
        yield from ["backbone"] * (node.attr == "backbone")
    for text in texts:
        yield from (match.group(0) for match in FAMILIES.finditer(HUMPS.sub("_", text)))


def source_files() -> list[Path]:
    folders = ("jdkd", "kernels", "csrc", "tests", "benchmarks")
    suffixes = {".py", ".cpp", ".cu", ".h", ".cuh", ".sh"}
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    return [ROOT / "setup.py", *sorted(files)]


def test_imports_keep_to_the_floors_and_rooms():
    assert import_violations(ROOT) == []


def test_no_imports_run_in_a_circle():
    graph = import_graph(ROOT)
    assert len(graph) > 100 and sum(map(len, graph.values())) > 300
    assert circles(graph) == [] and circles(room_graph(graph)) == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("import jdkd.nn.b", "import jdkd.nn.a"),
        ("from jdkd.nn import b", "def f():\n    from .a import thing"),
        ("from jdkd.nn.b import thing", "if TYPE_CHECKING:\n    from jdkd.nn.a import Thing"),
        ("from . import b", "from jdkd.nn import Thing"),  # of the package, whose __init__ imports a
    ],
)
def test_a_planted_circle_is_caught(tmp_path, first, second):
    room = tmp_path / "jdkd/nn"
    room.mkdir(parents=True)
    (room / "__init__.py").write_text("from jdkd.nn.a import Thing\n")
    (room / "a.py").write_text(first + "\n")
    (room / "b.py").write_text("import math\nfrom jdkd.nn import c\n")
    (room / "c.py").write_text("")
    assert circles(import_graph(tmp_path)) == []
    (room / "b.py").write_text(second + "\n")
    (circle,) = circles(import_graph(tmp_path))
    assert {"jdkd.nn.a", "jdkd.nn.b"} <= set(circle) and "jdkd.nn.c" not in circle


def test_a_planted_circle_of_rooms_is_caught(tmp_path):
    files = {"train/a": "import jdkd.distill.c", "distill/b": "import jdkd.train.d", "distill/c": "", "train/d": ""}
    for name, line in files.items():
        path = tmp_path / f"jdkd/{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line)
    graph = import_graph(tmp_path)
    assert circles(graph) == [] and circles(room_graph(graph)) == [("distill", "train")]


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("jdkd/ops/pearson.py", "from jdkd.nn import PKDLoss", "ops is on a floor left of nn"),
        ("jdkd/ops/pearson.py", "def f():\n    from ..search import run", "ops is on a floor left of search"),
        ("jdkd/ops/pearson.py", "if TYPE_CHECKING:\n    from jdkd.nn import PKDLoss", "ops is on a floor left of nn"),
        ("jdkd/ops/pearson.py", "if TYPE_CHECKING: ...\nelse:\n    import rich", "optional package rich"),
        ("jdkd/ops/pearson.py", "import triton", "only inside functions of ops"),
        ("jdkd/ops/pearson.py", "from jdkd import cli", "ops is on a floor left of cli"),
        ("jdkd/latency/measure.py", "def f():\n    import triton.testing", "only inside functions of ops"),
        ("jdkd/ops/pearson.py", "from jdkd import _C", "no Python module"),
        ("jdkd/nn/loss.py", "importlib.import_module('jdkd._C')", "no Python module"),
        ("jdkd/report/search_page.py", "try:\n    import matplotlib.pyplot\nexcept ImportError: ...", "matplotlib"),
        ("jdkd/data/digits.py", "from sklearn.datasets import load_digits", "sklearn"),
        ("jdkd/ops/pearson.py", "from kernels import pearson", "as jdkd.kernels"),
        ("kernels/pearson.py", "import numpy", "kernels import only"),
        ("kernels/pearson.py", "from jdkd.errors import InputError", "kernels import only"),
        ("jdkd/search/loop.py", "from jdkd.experimental import masked", "search is on a floor left of experimental"),
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
        ("jdkd/report/table.py", "if TYPE_CHECKING:\n    from rich.table import Table"),
        ("kernels/pearson.py", "import math\nimport triton.language as tl\nimport torch"),
    ],
)
def test_what_is_allowed_is_not_reported(tmp_path, file, line):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert import_violations(tmp_path) == []


def test_importing_the_package_loads_nothing_heavy():
    modules = "jdkd, jdkd.cli, jdkd.functional, jdkd.nn"
    script = f"import sys, {modules}; print(*sorted({NOT_AT_IMPORT!r}.intersection(sys.modules)))"
    command = [sys.executable, "-c", script]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (answer.returncode, answer.stdout.strip()) == (0, ""), answer.stderr


def test_the_command_line_is_read_in_cli_alone():
    assert command_line_readers(ROOT) == []


@pytest.mark.parametrize(
    "line", ["import sys\nprint(sys.argv[1:])", "from sys import argv", "import sys; sys.orig_argv"]
)
def test_a_planted_look_at_the_command_line_is_caught(tmp_path, line):
    for room in ("search", "cli"):
        (tmp_path / "jdkd" / room).mkdir(parents=True)
        (tmp_path / "jdkd" / room / "run.py").write_text(line)
    (found,) = command_line_readers(tmp_path)
    assert found.startswith("jdkd/search/run.py:")


def test_files_are_small():
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in source_files()}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_files_have_names_that_say_something():
    nameless = [path for path in source_files() if NAMELESS & {path.stem, path.parent.name}]
    assert [path for path in nameless if (ROOT / "csrc/common") not in path.parents] == []


def test_kernels_is_no_package_of_its_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_detectors_of_no_family_are_named_outside_of_detect():
    assert family_names(ROOT) == []


@pytest.mark.parametrize(
    "line",
    [
        "from torchvision.models.detection import whatever",
        "from models import FasterRCNN",
        "import models.rpn as proposing",
        "model.roi_heads(x)",
        "build(x).backbone",
        "getattr(model, 'box_head')",
        "def cut(fpn): ...",
        "make(faster_rcnn=1)",
        "class MySSDLite320Head: ...",
        "x: GeneralizedRCNNTransform",
        "layer1 = 3",
        "path = f'{prefix}.backbone.body.{name}'",
        "raise InputError('only a Mask R-CNN has masks')",
        "match x:\n    case 'fcos': ...",
    ],
)
def test_a_planted_family_is_caught(tmp_path, line):
    for room in ("search", "detect"):
        (tmp_path / "jdkd" / room).mkdir(parents=True)
        (tmp_path / "jdkd" / room / "run.py").write_text(line)
    found = family_names(tmp_path)
    assert found and all(each.startswith("jdkd/search/run.py:") for each in found)


@pytest.mark.parametrize(
    "line",
    [
        '"""As the heads of RetinaNet do."""',
        'class Flags:\n    model: str\n    """A detector, such as fcos_resnet50_fpn."""',
        "x = 1  # torchvision's FasterRCNN",
        "backbone = 'backbone'\nclassified = player1 = ssdx = 2",
    ],
)
def test_families_may_be_spoken_of(tmp_path, line):
    (tmp_path / "jdkd").mkdir()
    (tmp_path / "jdkd" / "run.py").write_text(line)
    assert family_names(tmp_path) == []
