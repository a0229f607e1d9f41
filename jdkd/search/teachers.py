"""Who can teach in a search: the pool that it is given, or grows from its base."""

from __future__ import annotations

from pathlib import Path

from jdkd.detect import load
from jdkd.detect.checkpoint import ARCHITECTURE
from jdkd.detect.input_size import require_visible
from jdkd.errors import InputError
from jdkd.files import read_as, write_json
from jdkd.pool import PoolTrainConfig, ScoredTeacher, TeacherPool, load_pool, train_pool
from jdkd.pool.elastic_pool import POOL
from jdkd.pool.foreign import require_common, require_name
from jdkd.pool.members import BASE
from jdkd.search.budget import Plan
from jdkd.search.config import SearchConfig
from jdkd.search.context import SearchContext
from jdkd.search.selection import say_if_trained_elsewhere
from jdkd.train import DivergenceError
from jdkd.train.record import trained_on

TEACHERS, POOL_SEED = "teachers.json", 100


def given_pool(folder: Path, context: SearchContext) -> TeacherPool:
    """A finished pool, its own or that of an earlier search."""
    pool = load_pool(folder, context.base, context.train, topology=context.topology, device=context.config.device)
    say_if_trained_elsewhere(f"the teacher pool in {folder}", pool.trained_on, context.train)
    if BASE in pool.foreign:  # which earlier versions let in
        raise InputError(
            f"the teacher pool in {folder} has a foreign teacher named {BASE}, as what the search starts from is; "
            "train one with that teacher in a folder of another name, or leave the pool out."
        )
    return _invited(pool, context)


def grown_pool(context: SearchContext, budget: Plan) -> TeacherPool:
    """The pool that a search grows from its base."""
    config = context.config
    try:
        pool = train_pool(
            context.base,
            context.train,
            context.selection.dataset,
            PoolTrainConfig(context.training(budget.pool, seed=POOL_SEED), head_weight=1.0),
            config.pool,
            topology=context.topology,
            device=config.device,
            resume=config.resume,
            progress=context.progress,
        )
    except DivergenceError as error:
        raise InputError(
            f"no teacher pool can be grown at the lr of {config.lr:g}: at step {error.step} {error.what} is not "
            "finite; search into another folder at a lower lr, or give a teacher_pool."
        ) from error
    return _invited(pool, context)


def _invited(pool: TeacherPool, context: SearchContext) -> TeacherPool:
    """The pool with the detectors of another make that may teach beside it."""
    for folder in context.config.teachers:
        pool.add_foreign(name_of(folder), load(folder, context.config.device))
    return pool


def name_of(teacher: Path) -> str:
    """The name of a detector that may teach: its folder's."""
    return teacher.absolute().name


def require_there(config: SearchConfig) -> None:
    """Refuses teachers by what their folders show, before anything is read.

    Raises:
        InputError: one is no detector or cannot be told from another by its name, or the pool is none.
    """
    names: list[str] = []
    for folder in config.teachers:
        require_name(name_of(folder), names)
        names.append(name_of(folder))
        if not (folder / ARCHITECTURE).is_file():
            load(folder)  # says what is wrong with it
    if config.teacher_pool is not None and not (config.teacher_pool / POOL).is_file():
        load_pool(config.teacher_pool, None, None)


def require_teachers(context: SearchContext) -> None:
    """Refuses detectors that cannot teach, before anything is written.

    Raises:
        InputError: one cannot be loaded or compared with the base, or does not see some of the images.
    """
    images = next(context.probe())[0][:1] if context.config.teachers else []
    for folder in context.config.teachers:
        name = name_of(folder)
        teacher = load(folder, context.config.device)
        require_visible(teacher, [*context.train.sizes, *context.selection.dataset.sizes], f"teacher {name}")
        require_common(name, teacher, context.base, images)
        say_if_trained_elsewhere(f"teacher {name}", trained_on(folder), context.train)


def remember(pool: TeacherPool, context: SearchContext) -> None:
    """Gives a pool the members that this search has scored; one that was scored on other images is scored anew."""
    file, selection = context.config.out / TEACHERS, context.selection.dataset
    if file.exists():
        remedy = "remove it and resume: teachers are scored again"
        pool.members = read_as(lambda members: [*map(ScoredTeacher.from_json, members)], file, remedy)
        return
    if pool.scored_on != selection.fingerprint:
        pool.score_members([member.teacher for member in pool.members], selection, context.progress)
    known = {member.teacher for member in pool.members}
    pool.members += [pool.score(name, selection) for name in pool.foreign if name not in known]
    write_teachers(pool, context)


def write_teachers(pool: TeacherPool, context: SearchContext) -> None:
    """Keeps the scores of a pool's members with the search."""
    write_json(context.config.out / TEACHERS, [member.to_json() for member in pool.members])
