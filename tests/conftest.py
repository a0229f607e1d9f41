"""What every test shares; it needs torch and pytest alone, so that it loads on a bare machine with a GPU too.

A test module of an operator names it, ``OP = "pearson"``, and its tests take the fixture ``backend``: each
then runs once per backend that this machine can run, inside ``use_backend``, and with ``device`` set to fit.
"""

import gc
import importlib.util
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
POISONED = ("ops", "nn", "experimental", "reference")

# What checks of kernels find is found once a run, by all of its processes, and the user's own verdicts stay alone.
os.environ.setdefault("TRITON_CACHE_DIR", str(Path("~/.triton/cache").expanduser()))  # where it is without a JDKD_CACHE
if "PYTEST_XDIST_WORKER" not in os.environ:
    _verdicts = tempfile.TemporaryDirectory(prefix="jdkd-tests-")  # until this process ends
    os.environ["JDKD_CACHE"] = _verdicts.name
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a job in the background has it; tests of Ctrl-C need it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is first imported
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")  # as it would compile six programs to find out what runs
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("jdkd", deadline=None, derandomize=True, database=None)
    settings.load_profile("jdkd")


def _interpreter_gap() -> str | None:
    """Says why Triton's interpreter cannot run here: it fails on numpy 2.4 and later."""
    if HAS_GPU or importlib.util.find_spec("numpy") is None:
        return None
    import numpy

    major, minor = (int(part) for part in numpy.__version__.split(".")[:2])
    return f"Triton's interpreter breaks on numpy {numpy.__version__}" if (major, minor) >= (2, 4) else None


def _device_of(backend: str) -> str:
    return "cuda" if HAS_GPU and backend != "cpu" else "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    from jdkd import _backend

    op = getattr(metafunc.module, "OP", None)
    if op is None:
        raise pytest.UsageError(f"{metafunc.module.__name__} takes the fixture 'backend', but has no OP")
    params = []
    for name, reason in _backend.available(op).items():
        if name == "cuda" and not HAS_GPU:
            continue
        reason = reason or (_interpreter_gap() if name == "triton" else None)
        marks = [pytest.mark.skip(reason=f"{name}: {reason}")] if reason else []
        if _device_of(name) == "cuda":
            marks.append(pytest.mark.gpu)
        params.append(pytest.param(name, marks=marks))
    metafunc.parametrize("backend", params, indirect=True)


@pytest.fixture(autouse=True)
def notices_are_said_again() -> None:
    """What one test was told once, the next is told again."""
    from jdkd import notices

    notices._said.clear()


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> None:
    """Triton's interpreter, where kernels run in it, without what costs it most."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        from tests.quick_interpreter import quicken

        quicken()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Half a million objects come to stay here; without this, every full collection of garbage looks through them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Long ones come first: workers steal from the end, so that no two make the same and none waits at the end.
    items.sort(key=lambda item: not item.path.stem.endswith(("_aot", "_search", "_packaging", "_compilation")))
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and none is visible"))


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """One backend of the module's operator, forced for the duration of the test."""
    from jdkd._backend import use_backend

    with use_backend(request.param):
        yield request.param


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """The device the test's backend runs on; without a backend, the GPU if there is one."""
    if "backend" in request.fixturenames:
        return _device_of(request.getfixturevalue("backend"))
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture
def nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that knows no verdict, and a cache of its own."""
    from jdkd import _backend, _verdicts

    monkeypatch.setenv("JDKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JDKD_BACKEND", raising=False)
    monkeypatch.setattr(_verdicts, "_known", {})
    monkeypatch.setattr(_backend, "_chosen", {})


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fills ``torch.empty`` with NaN in the tests of operators, so that a forgotten output cell shows."""
    folders = Path(request.node.path).relative_to(Path(__file__).parent).parts
    if folders[0] not in POISONED:
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Training and validation split of a handful of small digit scenes."""
    from jdkd.data import CocoDetectionDataset, resolve_splits, write_digit_scenes

    folder = tmp_path_factory.mktemp("digits") / "scenes"
    write_digit_scenes(folder, train=16, val=4, size=64, seed=0)
    return tuple(CocoDetectionDataset(split) for split in resolve_splits(folder))


@pytest.fixture(scope="session")
def when_asked(request):
    """Skips what takes minutes, unless slow tests are asked for: ``pytest -m slow``."""
    if "slow" not in (request.config.option.markexpr or ""):
        pytest.skip("takes minutes; run it with: pytest -m slow")
