"""One candidate, from proposal to outcome: inherit, train, score. Wherever it runs, equal proposals end alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from jdkd.detect import load, save
from jdkd.detect.input_size import training_sizes
from jdkd.distill import Distiller, can_distil_heads
from jdkd.distill.training import lessons
from jdkd.latency import fuse_for_inference
from jdkd.notices import ProgressCallback
from jdkd.pool import TeacherPool
from jdkd.pool.members import BASE, Teacher
from jdkd.search.config import SearchConfig
from jdkd.search.context import TRAINING, SearchContext, candidate_folder, open_context
from jdkd.search.inheriting import fresh, inherit
from jdkd.search.proposal import Proposal
from jdkd.search.spending import Spending
from jdkd.search.teachers import given_pool, name_of
from jdkd.train import fit
from jdkd.train.checkpoint import CHECKPOINT

Json = dict[str, Any]


@dataclass(frozen=True)
class SearchTask:
    """What all candidates of a search have in common, as an executor takes it (:class:`jdkd.execution.Task`).

    Args:
        config: the search; its base and its pool are read.
    """

    config: SearchConfig

    @property
    def out(self) -> Path:
        return self.config.out

    @property
    def inputs(self) -> dict[str, Path]:
        teachers = {f"teachers/{name_of(folder)}": folder for folder in self.config.teachers}
        return {"base": self.config.base, **({"pool": pool} if (pool := self.config.pool).is_dir() else {}), **teachers}

    def open(self, device: str, progress: ProgressCallback) -> Evaluator:
        """Loads base, data and teachers, once a process."""
        context = open_context(replace(self.config, device=device), progress)
        return Evaluator(context, given_pool(self.config.pool, context) if self.config.pool.is_dir() else None)

    def elsewhere(self, out: Path, inputs: Mapping[str, Path]) -> SearchTask:
        """The same where the folders lie elsewhere."""
        teachers = tuple(folder for name, folder in inputs.items() if name.startswith("teachers/"))
        here = {"base": inputs["base"], "teacher_pool": inputs.get("pool"), "teachers": teachers}
        return replace(self, config=replace(self.config, out=out, **here))

    def reads(self, job: Json) -> tuple[str, ...]:
        return (job["from"],) if job["from"] else ()

    def writes(self, job: Json) -> tuple[str, ...]:
        return (candidate_folder(job["number"]),)


class Evaluator:
    """Trains and scores candidates, each in a folder of its own.

    Args:
        context: base, data and settings.
        pool: the teachers besides the base; None where there are none.
    """

    def __init__(self, context: SearchContext, pool: TeacherPool | None) -> None:
        self.context, self.pool = context, pool
        self._taught_by: tuple[TeacherPool | None, Teacher, nn.Module] | None = None  # the last teacher, deployed

    def __call__(self, job: Json) -> Json:
        """Makes a candidate, or carries on one that was interrupted.

        Args:
            job: a proposal as JSON, and ``from``: folder of its parent below the search's, None for the base.

        Returns:
            Its scores, and seconds by what they were spent on; the detector lies in the candidate's folder then.

        Raises:
            ModelError: it cannot be trained or scored.
        """
        context, spent = self.context, Spending()
        parent = context.config.out / job["from"] if job["from"] else None
        proposal = Proposal.from_json({name: value for name, value in job.items() if name != "from"})
        student = self._trained(proposal, parent, spent)
        with spent.on("scoring"):
            scores = context.scored(student, context.selection)
        return {"map": scores.map, "map50": scores.map50, "seconds": spent.seconds}

    def _trained(self, proposal: Proposal, parent: Path | None, spent: Spending) -> nn.Module:
        context, config, cycle = self.context, self.context.config, proposal.cycle
        folder = context.folder(proposal.number)
        with spent.on("inheriting"):
            student = self._child(proposal, parent)
            if proposal.rewrites and not config.method.inherit:
                student = fresh(student, proposal.number)
            teacher = self._teacher(proposal.teacher)
        schedule = {"lr": cycle.lr, "cycle_start": cycle.start, "cycle_steps": cycle.total}
        how = context.training(cycle.steps, proposal.number, student, **schedule)
        said = f"candidate {proposal.number}: {proposal.action}"
        with spent.on("training"), self._taught(student, teacher, how.sizes) as taught:
            fit(
                student,
                context.train,
                how,
                device=config.device,
                folder=folder / TRAINING,
                resume=True,
                inherit=_moments(parent) if proposal.kind == "train" else None,
                progress=lambda *state: context.progress(said, *state),
                **taught,
            )
            save(folder, context.calibrated(student))
        return student

    def _child(self, proposal: Proposal, parent: Path | None) -> nn.Module:
        """What a candidate is before it is trained."""
        context, config = self.context, self.context.config
        if (number := proposal.number) in context.children:
            return context.children.pop(number)
        if not proposal.rewrites:
            return context.made(int(parent.name)) if parent else load(config.base, config.device)
        before = context.made(int(parent.name)) if parent else context.base
        return inherit(before, context.read(before), proposal.rewrites, context).model

    def _teacher(self, teacher: Teacher | None) -> nn.Module | None:
        """A teacher as it would be deployed: without norms of its own it takes less time.

        The last one is kept: the next candidate mostly has the same, and a pool's teachers stay as they are.
        """
        if teacher is None or teacher == BASE:
            return self.context.deployed_base if teacher else None
        if self._taught_by is None or self._taught_by[0] is not self.pool or self._taught_by[1] != teacher:
            self._taught_by = None  # before there is another
            self._taught_by = self.pool, teacher, fuse_for_inference(self.pool.teacher(teacher))
        return self._taught_by[2]

    @contextmanager
    def _taught(
        self, student: nn.Module, teacher: nn.Module | None, sizes: Sequence[int] | None
    ) -> Iterator[dict[str, Any]]:
        """What a training is given besides its settings: the losses of a student under its teacher."""
        if teacher is None:
            yield {}
            return
        config = self.context.config
        weights = {"feature_weight": config.feature_weight}
        with training_sizes(student, sizes):
            if config.head_weight and can_distil_heads(student, teacher, own_size=True):
                weights["head_weight"] = config.head_weight
        how = {"adapter": True, "own_size": True, "imitation": config.method.imitation}
        distiller = Distiller(student, teacher, **weights, **how)
        distiller.calibrate(self.context.probe())
        with lessons(student, distiller) as given:
            yield given


def _moments(parent: Path | None) -> Path | None:
    """What a training takes its optimizer's state from: the parent's, unless it has none, as the base, or no more.

    Only where the teacher stays too, else Adam's moments are of another loss: from the finalists of three searches the
    students whose optimizer began anew when their teacher left ended 0.008, 0.027 and 0.033 mAP ahead, one pair each.
    """
    return parent / TRAINING if parent and (parent / TRAINING / CHECKPOINT).exists() else None
