"""See :func:`mirror_to_optuna`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jdkd.errors import InputError, said
from jdkd.report.outcome import KINDS, Outcome
from jdkd.search.archive import Candidate

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

MARK = "jdkd search"  # the attribute by which a study is known as a search's mirror; holds the base's id and its begin
OBJECTIVES = {"mAP": "maximize", "latency_ratio": "minimize"}


def mirror_to_optuna(outcome: Outcome, storage: str) -> Study:
    """Mirrors an archive as an Optuna study of two objectives, which its dashboard can open, by the name of its folder.

    Trials come in the archive's order; failed candidates are trials that failed. Mirroring again adds what is new. As
    a trial cannot be changed, the study is made anew where the archive says something else by now of a candidate that
    is in it: a latency that was measured again, or a teacher that no trial had before.

    Args:
        outcome: of a search, finished or under way.
        storage: what Optuna takes for one, `sqlite:///study.db` say.

    Returns:
        The study.

    Raises:
        InputError: the storage cannot be used, or a study of that name is not a mirror of this search.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    name = outcome.folder.resolve().name
    wanted = _trials(outcome.candidates)
    own = f"{outcome.candidates[0].id} {outcome.run.get('started')}"  # searches of several seeds have one base
    given = {"storage": storage, "study_name": name}
    directions = {"directions": [*OBJECTIVES.values()]}
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it announces every study that it makes
    try:
        study = optuna.create_study(**given, **directions, load_if_exists=True)
        there = study.get_trials(deepcopy=False)
        if there and study.user_attrs.get(MARK) != own:
            raise InputError(
                f"{storage} holds a study {name!r} that is no mirror of this search; give another storage."
            )
        if not all(map(_alike, there, wanted)) or len(there) > len(wanted):
            optuna.delete_study(**given)
            study, there = optuna.create_study(**given, **directions), []
        study.set_user_attr(MARK, own)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([*OBJECTIVES])
        study.add_trials(wanted[len(there) :])
    except InputError:
        raise
    except (SQLAlchemyError, optuna.exceptions.OptunaError, ValueError, ImportError) as error:
        why = said(error.__cause__ or error)  # Optuna's own says only that a commit failed
        raise InputError(f"{storage} cannot hold an Optuna study ({why}); give one such as sqlite:///a.db.") from None
    finally:
        optuna.logging.set_verbosity(level)
    return study


def _trials(candidates: Sequence[Candidate]) -> list[FrozenTrial]:
    """Candidates as trials, whose parameters range over what there is so far."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    teachers = sorted({str(one.teacher) for one in candidates if one.teacher is not None})
    ranges = {
        "kind": CategoricalDistribution(("base", *KINDS)),
        "generation": IntDistribution(0, candidates[-1].generation),
        "steps": IntDistribution(0, max(one.steps for one in candidates)),
        "target": FloatDistribution(0.0, 1.0),
        "teacher": CategoricalDistribution(teachers) if teachers else None,
    }
    return [_trial(one, ranges) for one in candidates]


def _trial(one: Candidate, ranges: Mapping[str, Any]) -> FrozenTrial:
    """A candidate as a trial of Optuna's."""
    from optuna.trial import TrialState, create_trial

    teacher = None if one.teacher is None else str(one.teacher)
    given = {"kind": one.kind, "generation": one.generation, "steps": one.steps, "target": one.target}
    parameters = {name: value for name, value in (given | {"teacher": teacher}).items() if value is not None}
    failed = one.failure is not None or not math.isfinite(one.map + one.latency_ratio)
    told: dict[str, Any] = {"candidate": one.id, "action": one.action, "parent": one.parent}
    told |= {"failure": one.failure} if failed else {"latency_interval": list(one.latency_interval)}
    return create_trial(
        state=TrialState.FAIL if failed else TrialState.COMPLETE,
        values=None if failed else [one.map, one.latency_ratio],
        params=parameters,
        distributions={name: ranges[name] for name in parameters},
        user_attrs=told,
    )


def _alike(there: FrozenTrial, wanted: FrozenTrial) -> bool:
    """Whether a trial of the study says what it should; Optuna lets ranges of numbers differ, and no choices."""
    names = ("state", "values", "params", "user_attrs")
    choices = [
        {name: kind.choices for name, kind in trial.distributions.items() if hasattr(kind, "choices")}
        for trial in (there, wanted)
    ]
    return choices[0] == choices[1] and all(getattr(there, name) == getattr(wanted, name) for name in names)
