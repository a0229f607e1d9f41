"""See :func:`mirror_to_optuna`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jdkd.errors import InputError
from jdkd.report.outcome import Outcome
from jdkd.search.archive import Candidate

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

MARK = "jdkd search"  # the attribute by which a study is known as a search's mirror; holds the base's id
OBJECTIVES = {"mAP": "maximize", "latency_ratio": "minimize"}
KINDS = ("base", "morph", "teacher", "train")
MOST = 10**9  # of steps and generations


def mirror_to_optuna(outcome: Outcome, storage: str, name: str | None = None) -> Study:
    """Mirrors an archive as an Optuna study of two objectives, which its dashboard can open.

    Trials come in the archive's order; failed candidates are trials that failed. Mirroring again adds what is new. As
    a trial cannot be changed, the study is made anew where the archive says something else by now of a candidate that
    is in it: a latency that was measured again, or a teacher that no trial had before.

    Args:
        outcome: of a search, finished or under way.
        storage: what Optuna takes for one, `sqlite:///study.db` say.
        name: of the study; by default the name of the search's folder.

    Returns:
        The study.

    Raises:
        InputError: the storage cannot be used, or a study of that name is not a mirror of this search.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    name = outcome.folder.resolve().name if name is None else name
    teachers = sorted({str(one.teacher) for one in outcome.candidates if one.teacher is not None})
    wanted = [_trial(one, teachers) for one in outcome.candidates]
    own = outcome.candidates[0].id
    given = {"storage": storage, "study_name": name}
    directions = {"directions": [*OBJECTIVES.values()]}
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it announces every study that it makes
    try:
        study = optuna.create_study(**given, **directions, load_if_exists=True)
        there = study.get_trials(deepcopy=False)
        if there and study.user_attrs.get(MARK) != own:
            raise InputError(
                f"{storage} holds a study {name!r} that is no mirror of this search; give another storage or name."
            )
        if not all(map(_alike, there, wanted)) or len(there) > len(wanted):
            optuna.delete_study(**given)
            study, there = optuna.create_study(**given, **directions), []
        study.set_user_attr(MARK, own)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([*OBJECTIVES])
        study.add_trials(wanted[len(there) :])
    except (SQLAlchemyError, ValueError, ImportError) as error:
        why = str(error).strip().splitlines()[0]
        raise InputError(f"{storage} cannot hold an Optuna study ({why}); give one such as sqlite:///a.db.") from None
    finally:
        optuna.logging.set_verbosity(level)
    return study


def _trial(one: Candidate, teachers: Sequence[str]) -> FrozenTrial:
    """A candidate as a trial of Optuna's."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.trial import TrialState, create_trial

    parameters = {
        "kind": (one.kind, CategoricalDistribution(KINDS)),
        "generation": (one.generation, IntDistribution(0, MOST)),
        "steps": (one.steps, IntDistribution(0, MOST)),
    }
    if one.target is not None:
        parameters["target"] = (one.target, FloatDistribution(0.0, 1.0))
    if one.teacher is not None:
        parameters["teacher"] = (str(one.teacher), CategoricalDistribution(teachers))
    failed = one.failure is not None or not math.isfinite(one.map + one.latency_ratio)
    told: dict[str, Any] = {"candidate": one.id, "action": one.action, "parent": one.parent}
    told |= {"failure": one.failure} if failed else {"latency_interval": list(one.latency_interval)}
    return create_trial(
        state=TrialState.FAIL if failed else TrialState.COMPLETE,
        values=None if failed else [one.map, one.latency_ratio],
        params={name: value for name, (value, _) in parameters.items()},
        distributions={name: kind for name, (_, kind) in parameters.items()},
        user_attrs=told,
    )


def _alike(there: FrozenTrial, wanted: FrozenTrial) -> bool:
    """Whether a trial of the study says what it should."""
    names = ("state", "values", "params", "distributions", "user_attrs")
    return all(getattr(there, name) == getattr(wanted, name) for name in names)
