"""The command line."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Annotated, Any, Union

from jdkd.cli.failures import Interrupted, full_disk
from jdkd.errors import InputError, one_of_these
from jdkd.notices import Notice

REFUSED = 2
"""Exit code for what the user can act on: bad input, a full disk, Ctrl-C, a package that is not installed."""

EXTRAS = {
    **{name: name for name in ("optuna", "ray", "tensorboard")},
    **dict.fromkeys(("onnx", "onnxruntime"), "export"),
}
"""The extra of each package that jdkd[detect] does not bring."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; those of the process by default.

    Returns:
        The exit code: 0, or what the command returns; 2 after one sentence on stderr. Errors that are ours keep
        their traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with _notices_as_lines(), _quiet_beside_the_first():
            code = _parse(argv)()
        sys.stdout.flush()
        return code or 0
    except BrokenPipeError:  # whoever read our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except InputError as error:
        return _refuse(str(error))
    except Interrupted as interruption:
        return _refuse(f"interrupted, {interruption}; carry on with: {_resuming(argv)}")
    except KeyboardInterrupt:
        return _refuse("interrupted; what was not finished was not written.")
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] == "jdkd":
            raise
        extra = EXTRAS.get(error.name, "detect")
        return _refuse(f"the package {error.name} is missing; install it with: pip install 'jdkd[{extra}]'")
    except OSError as error:
        if not full_disk(error):
            raise
        return _refuse(f"the disk is full, {error.filename or 'the output'} was not written; make room and repeat.")


def _parse(argv: list[str]) -> Callable[[], int | None]:
    """The command that the arguments name; what tyro refuses ends the process with exit code 2.

    Raises:
        InputError: there is no command of that name.
    """
    import tyro

    from jdkd.cli.check import Check
    from jdkd.cli.data import CheckData, Digits
    from jdkd.cli.distill import Distill
    from jdkd.cli.env import Env
    from jdkd.cli.evaluate import Eval
    from jdkd.cli.export import Export
    from jdkd.cli.importing import Import
    from jdkd.cli.inspect import Inspect
    from jdkd.cli.latency import Latency
    from jdkd.cli.pool import PoolEval, PoolExport, PoolTrain
    from jdkd.cli.predict import Predict
    from jdkd.cli.report import Report
    from jdkd.cli.search import Search
    from jdkd.cli.show import Show
    from jdkd.cli.swap import Swap
    from jdkd.cli.train import Train
    from jdkd.cli.tune import Tune

    def named(name: str, command: Any, *markers: Any) -> Any:
        return Annotated[(command, tyro.conf.subcommand(name=name), *markers)]

    positional = tyro.conf.PositionalRequiredArgs
    by_name = getattr(tyro.conf, "PositionalMetavarFromFieldName", positional)  # tyro had no such marker at first
    data = Union[named("digits", Digits, positional), named("check", CheckData, positional)]  # noqa: UP007
    pool = Union[  # noqa: UP007
        named("train", PoolTrain), named("eval", PoolEval, positional), named("export", PoolExport, positional)
    ]
    commands = (
        Annotated[data, tyro.conf.subcommand(name="data", description="Make data to try things on, or check data.")],
        named("import", Import, positional),
        named("inspect", Inspect, positional),
        named("train", Train),
        named("distill", Distill),
        Annotated[pool, tyro.conf.subcommand(name="pool", description="Train, measure and open a teacher pool.")],
        named("search", Search),
        named("report", Report, positional),
        named("eval", Eval, positional),
        named("show", Show, positional),
        named("swap", Swap),
        named("latency", Latency, positional),
        named("export", Export, positional),
        named("predict", Predict, positional),
        named("env", Env),
        named("check", Check),
        named("tune", Tune),
    )
    names = [note.name for command in commands for note in command.__metadata__ if hasattr(note, "name")]
    if argv and not argv[0].startswith("-") and argv[0] not in names:
        raise InputError(f"{argv[0]!r} is no command, as {', '.join(names)} are; {one_of_these(argv[0], names)}.")
    return tyro.cli(
        Union[commands],  # noqa: UP007
        prog="jdkd",
        description="Knowledge distillation, pruning and architecture search of object detectors.",
        args=argv,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, by_name),
    )


@contextmanager
def _notices_as_lines() -> Iterator[None]:
    """Prints each :class:`Notice` as one line on stderr instead of a warning with a line of our code."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)
        otherwise = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, Notice):
                print(f"jdkd: {' '.join(str(message).split())}", file=sys.stderr)
            else:
                otherwise(message, category, *where, **more)

        warnings.showwarning = show
        yield


@contextmanager
def _quiet_beside_the_first() -> Iterator[None]:
    """Of several processes of one training only the first tells what it does; what one refuses is said all the same."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _refuse(sentence: str) -> int:
    print(f"jdkd: {' '.join(sentence.split())}", file=sys.stderr)
    return REFUSED


def _resuming(argv: list[str]) -> str:
    return shlex.join(["jdkd", *argv, *([] if "--resume" in argv else ["--resume"])])
