"""`jdkd data`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jdkd.cli.flags import DataFlags
from jdkd.cli.progress import Progress
from jdkd.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from jdkd.data.checking import Inspection
    from jdkd.data.problems import Problem

SPLITS = ("train", "val")
UNFOLDED = 10_000  # columns, where no terminal is: one line for each problem or row, for grep
STYLES = {"error": "bold red", "repair": "yellow", "warning": "yellow"}


@dataclass(frozen=True)
class Digits:
    """Write the embedded handwritten digits, on photographs, as a COCO-format folder."""

    out: Path
    """Folder to write; it appears whole or not at all."""
    train: int = 400
    """Training images."""
    val: int = 100
    """Validation images; none of their digits occur in training images."""
    size: int = 128
    """Height and width in pixels."""
    seed: int = 0
    """Equal seeds give equal images."""
    one_class: bool = False
    """Call every digit "digit", in the same images: an easier task, learned in fewer steps."""
    resume: bool = False
    """Accept a folder that holds exactly these images already."""

    def __call__(self) -> None:
        from jdkd.data import write_digit_scenes

        with Progress() as progress:
            write_digit_scenes(
                self.out,
                train=self.train,
                val=self.val,
                size=self.size,
                seed=self.seed,
                one_class=self.one_class,
                resume=self.resume,
                progress=progress.task("digit scenes"),
            )
        print(f"{self.out}: {self.train} training and {self.val} validation images of {self.size} px")


@dataclass(frozen=True)
class CheckData:
    """List everything that is wrong with COCO-format data: of the annotations, and of every image by decoding it.

    Ends with exit code 2 where there is an error, which is what training refuses.
    """

    folders: tuple[Path, ...]
    """Folders in the COCO layout; none where the flags name the files."""
    source: DataFlags = field(default_factory=DataFlags)

    def __call__(self) -> None:
        from rich.console import Console

        sources = [DataFlags(folder, strict=self.source.strict) for folder in self.folders]
        if self.source.given or not sources:
            sources.append(self.source)
        console, found = Console(width=None if sys.stdout.isatty() else UNFOLDED), []
        with Progress() as progress:
            for source in sources:
                found += _inspected(source, progress)
        problems = [problem for _, its in found for problem in its]
        for problem in problems:
            _print(console, problem)
        for line, _ in found:
            console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
        errors = [problem for problem in problems if self.source.strict or problem.severity == "error"]
        if errors:
            count, files = sum(problem.count for problem in errors), dict.fromkeys(str(one.file) for one in errors)
            raise InputError(
                f"{count:,} error{'s' if count > 1 else ''} in {', '.join(files)}, listed above: correct them, then "
                "check again."
            )


def _inspected(source: DataFlags, progress: Progress) -> Iterator[tuple[str, list[Problem]]]:
    """A line on each split of a data set, and what is wrong with it and with the two together."""
    from jdkd.data.checking import compare_splits, count_by_severity, inspect_split
    from jdkd.data.problems import Problem

    found: dict[str, Inspection] = {}
    for name in SPLITS:
        given = getattr(source, f"{name}_images"), getattr(source, f"{name}_annotations")
        if source.given and source.data is None and given == (None, None):
            continue
        try:
            split = source.split(name)
        except InputError as error:
            if not (source.data and source.data.is_dir()):
                raise
            what, _, remedy = str(error).partition("; ")
            missing = Problem("missing files", source.data, [0], lambda _, what=what: what, remedy)
            yield f"{source.data}: no {name} split", [missing]
            continue
        task = progress.task(f"{name} images")
        found[name] = one = inspect_split(split, decode=True, progress=task)
        yield f"{split.annotations}: {one.summary}", one.problems
    if len(found) == len(SPLITS):
        together = compare_splits(found["train"], found["val"])
        if together:
            yield f"training and validation data together: {count_by_severity(together)}", together


def _print(console: Console, problem: Problem) -> None:
    """Every case of a problem, under its file and with its remedy."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = f"{problem.severity}: {problem.kind} ({problem.count:,}) in {problem.file}"
    console.print(Text(printable(title), STYLES[problem.severity]), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(Text(problem.remedy, "dim"), overflow="fold")
    for case in problem.cases:
        table.add_row(Text(printable(case)))
    console.print(table)
    console.print()


def printable(text: str) -> str:
    """The text without what a terminal would take for a command or cannot encode."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
