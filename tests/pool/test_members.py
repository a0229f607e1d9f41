"""Foreign teachers beside the subnets, what phases train, and how much is scored."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from jdkd.data import batches
from jdkd.detect import load, read
from jdkd.detect.input_size import training_sizes
from jdkd.errors import InputError
from jdkd.pool import (
    PHASES,
    Phase,
    PoolTrainConfig,
    ScoredTeacher,
    Space,
    Subnet,
    Supernet,
    TeacherPool,
    grow_base,
    load_pool,
    save_pool,
    teacher_from_json,
    teacher_to_json,
    train_pool,
)
from jdkd.pool.growing import SCORED, affordable, spread_over
from jdkd.pool.members import BASE
from jdkd.pool.shrinking import _losses, progressive_shrinking
from jdkd.rewrite import describe
from jdkd.train import TrainConfig
from tests.detectors import detector, small_spec


def pool_of(train, **changes) -> TeacherPool:
    base = detector(small_spec(classes=train.classes, **changes))
    topology = read(base)
    space = Space.from_base(topology)
    return TeacherPool(Supernet(space, *grow_base(base, topology, space)), train, 2, 0, "cpu")


@pytest.fixture
def pool(digits):
    return pool_of(digits[0])


def test_a_subnet_is_recalibrated_once_and_is_the_same_ever_after(pool, monkeypatch):
    smallest = pool.space.smallest
    first = pool.teacher(smallest)
    monkeypatch.delattr("jdkd.pool.elastic_pool.calibrate")
    again = pool.teacher(smallest)
    assert again is not first and not again.training
    ours, raw = first.state_dict(), pool.supernet.extract(smallest).state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in again.state_dict().items())
    assert any(not torch.equal(tensor, ours[name]) for name, tensor in raw.items()), "it is recalibrated"


def test_a_detector_of_other_channels_and_blocks_is_scored_and_kept_like_a_subnet(pool, digits, tmp_path):
    train, selection = digits
    foreign = detector(small_spec("bottleneck", classes=train.classes, fpn=24, min_size=96, max_size=128), seed=4)
    pool.add_foreign("deep", foreign)
    pool.score_members([pool.space.smallest, "deep", "deep"], selection)
    assert {member.teacher for member in pool.members} == {pool.space.smallest, "deep"} and len(pool.members) == 2
    assert pool.teacher("deep") is foreign and not foreign.training
    save_pool(tmp_path, pool)
    again = load_pool(tmp_path, None, train)
    assert again.members == pool.members
    state = again.teacher(again.named("deep")).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in foreign.state_dict().items())
    (kept,) = json.loads((tmp_path / "pool.json").read_text())["foreign"].values()
    assert len(kept) == 64
    whole, ours = load(tmp_path).state_dict(), pool.teacher(pool.space.largest).state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in whole.items()), "a detector, with norms of its own"
    with pytest.raises(InputError, match=r"no foreign teacher 'other', its foreign teachers are: deep"):
        again.teacher("other")


def test_the_best_of_a_pool_whose_teachers_were_not_scored_is_refused(pool):
    with pytest.raises(InputError, match=r"^'best' is the teacher of the highest score, and none .* was scored; give"):
        pool.named("best")
    pool.members = [ScoredTeacher(pool.space.smallest, 0.5, 1)]
    assert pool.named("best") == pool.space.smallest


def test_who_cannot_teach_is_refused_and_says_why(pool, digits):
    train = digits[0]
    good = detector(small_spec(classes=train.classes))

    def of(classes):
        model = detector(small_spec(classes=classes))
        return model

    coarse = detector(small_spec(classes=train.classes))
    coarse.backbone.fpn.register_forward_hook(
        lambda module, inputs, levels: {name: level for name, level in levels.items() if name == "pool"}
    )
    unnamed = detector(small_spec(classes=train.classes))
    known = unnamed.architecture
    unnamed.architecture = describe(unnamed, known.builder, known.arguments)
    pool.add_foreign("kept", good)
    for name, model, says in (
        ("other", of(train.classes[:-1]), r"teacher other knows the classes .* \(9\) and the pool .* \(10\)"),
        ("turned", of(train.classes[::-1]), "in another order; give a detector of the pool's classes"),
        ("coarse", coarse, r"teacher coarse has levels of stride \[\] and the pool of stride \[4, 8, 16, 32\]"),
        ("plain", nn.Conv2d(3, 3, 1), "teacher plain takes a detector that carries its architecture"),
        ("kept", good, "has a foreign teacher kept already"),
        ("best", good, "named best, as a subnet is"),
        (BASE, good, "a foreign teacher base is named as what the search starts from"),
        ("2x0.5", good, "named 2x0.5, as a subnet is"),
        ("../up", good, r"named '\.\./up'; give it a name of letters"),
    ):
        with pytest.raises(InputError, match=says):
            pool.add_foreign(name, model)
    assert list(pool.foreign) == ["kept"]


def test_a_teacher_is_json_and_back():
    for teacher in ("deep", Subnet((1, 2), (0.5, 1.0))):
        fields = json.loads(json.dumps(teacher_to_json(teacher)))
        assert teacher_from_json(fields) == teacher and len(fields) == 1
        member = ScoredTeacher(teacher, 0.25, 100)
        assert ScoredTeacher.from_json(json.loads(json.dumps(member.to_json()))) == member


def test_a_pool_of_an_earlier_version_opens(pool, digits, tmp_path):
    save_pool(tmp_path, pool)
    facts = json.loads((tmp_path / "pool.json").read_text())
    del facts["foreign"]
    facts["members"] = [{**teacher_to_json(pool.space.largest), "map": 0.5, "parameters": 7, "distance": 0.1}]
    (tmp_path / "pool.json").write_text(json.dumps(facts))
    again = load_pool(tmp_path, None, digits[0])
    assert again.members == [ScoredTeacher(pool.space.largest, 0.5, 7)] and not again.foreign


def test_a_subnet_is_found_by_its_name():
    space = Space(((1, 2), (2,)), (2 / 3, 5 / 6, 1.0), 1.5)
    for subnet in (space.largest, space.smallest, Subnet((1, 2), (5 / 6, 2 / 3))):
        assert space.named(str(subnet)) == subnet and space.named(str(subnet).replace(" ", ",")) == subnet
    assert space.named("largest") == space.largest and space.named("smallest") == space.smallest
    assert space.named("1x0.75 2x1") == Subnet((1, 2), (0.75, 1.0))
    assert space.named("1x1 1x1") == Subnet((1, 1), (1.0, 1.0)), "less than the smallest runs too"
    for name, asked in (("0x1 2x1", "0 blocks at width 1"), ("1x0 2x1", "1 blocks at width 0")):
        with pytest.raises(InputError, match=f"stage 1 asks for {asked}"):
            space.named(name)
    for name in ("", "2", "2x", "x1 2x1", "1x1;2x1"):
        with pytest.raises(InputError, match="names no subnet; give largest, smallest, best, or blocks x width"):
            space.named(name)


@pytest.mark.parametrize(
    ("depths", "widths"), [(((2, 1),), (1.0,)), (((1, 2),), (1.0, 0.5)), (((1, 2),), (0.5,)), (((),), (1.0,))]
)
def test_a_space_ascends_to_the_whole(depths, widths):
    with pytest.raises(InputError, match="must ascend, widths to 1"):
        Space(depths, widths)


class Silent:
    """In place of a distiller, one that teaches nothing."""

    class runner:
        enabled = True

    def losses(self):
        return {"taught": torch.zeros(())}


def test_all_of_a_step_see_images_of_the_sizes_that_were_drawn_for_it(pool, digits):
    model, sizes = pool.supernet.model.train(), []
    losses = _losses(pool.supernet, Silent(), Phase("full", 1.0, 0.5, 2, 1.0, True), seed=1)
    images, targets = next(batches(digits[0], batch_size=4, steps=1, seed=0))
    hook = model.transform.register_forward_hook(lambda *given: sizes.append(tuple(given[-1][0].image_sizes)))
    with training_sizes(model, (32, 48, 64)):
        steps = [[*losses(images, targets, step)] and sizes[-4:] for step in range(3)]
    hook.remove()
    assert [len({*step}) for step in steps] == [1, 1, 1] and len({*sizes}) == 3, "anew for each step"


@pytest.mark.parametrize(("subnets", "sandwich"), [(2, False), (0, True), (2, True)])
def test_a_step_trains_the_largest_then_the_smallest_where_asked_then_what_is_drawn(pool, digits, subnets, sandwich):
    phase = Phase("full", 1.0, 0.5, subnets, 1.0, sandwich)
    losses, open_now = _losses(pool.supernet, Silent(), phase, seed=1), pool.space.top_fraction(0.5)
    pool.supernet.model.train()
    images, targets = next(batches(digits[0], batch_size=1, steps=1, seed=0))

    def run(step):
        return [(pool.supernet.active, "taught" in terms) for terms in losses(images, targets, step)]

    ran = run(0)
    assert len(ran) == phase.passes and ran[0] == (pool.space.largest, False)
    assert all(taught for _, taught in ran[1:])
    assert not sandwich or ran[1][0] == open_now.smallest != pool.space.smallest
    assert run(0) == ran and (not subnets or run(1) != ran)


def test_passes_of_a_sandwich_are_counted():
    phases = (replace(PHASES[0], share=0.4), Phase("full", 0.6, 1.0, 2, 0.5, sandwich=True))
    config = PoolTrainConfig(TrainConfig(steps=100), phases)
    assert [config.phase_config(number).steps for number in range(2)] == [40, 15] and config.passes == 40 + 4 * 15


def test_no_more_is_scored_than_a_share_of_the_training_pays():
    def of(steps, images):
        return affordable(PoolTrainConfig(TrainConfig(steps=steps, batch_size=8)), images)

    assert of(10**6, 100) == SCORED and of(10, 10**5) == 2
    assert of(1000, 200) == int(0.2 * 3 * 1000 * 8 / (2 * 200 + 8 * 8)) == 10, "eight batches recalibrate each"
    assert 2 < of(300, 100) < of(500, 100) < SCORED and of(500, 400) < of(500, 100)


def test_the_spread_holds_the_largest_the_smallest_and_no_subnet_twice():
    space = Space(((1, 2), (2, 3)), (0.5, 1.0), 2.0)
    found = spread_over(space, 10, seed=3)
    assert found[:2] == [space.largest, space.smallest] and len(set(found)) == len(found) == 10
    assert len(spread_over(space, 50, seed=3)) == 16, "the space has no more"
    assert spread_over(space, 1, seed=3) == [space.largest]


def test_a_training_of_other_phases_is_not_carried_on(digits, tmp_path):
    train, selection = digits
    base = detector(small_spec(classes=train.classes))
    config = PoolTrainConfig(
        TrainConfig(steps=3, batch_size=1), (Phase("full", 0.7, 1, 1, 1), Phase("large", 0.3, 0, 0, 1))
    )

    def stop(*state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_pool(base, train, selection, config, tmp_path, progress=stop)
    full, large = config.phases
    for phases, says in (((replace(full, top_fraction=0.5), large), "phases was"), ((large, full), "phase_order was")):
        with pytest.raises(InputError, match=f"cannot resume with other plan: {says}"):
            train_pool(base, train, selection, replace(config, phases=phases), tmp_path, resume=True)
    with pytest.raises(InputError, match="holds the training of another pool"):
        train_pool(base, train, selection, config, tmp_path)
    twin = detector(small_spec(classes=train.classes), seed=5)
    with pytest.raises(
        InputError, match=r"cannot resume with other plan: base was .*'weights': '[0-9a-f]{64}'} and is"
    ):
        train_pool(twin, train, selection, config, tmp_path, resume=True)
    plan = json.loads((tmp_path / "training" / "plan.json").read_text())
    del plan["base"], plan["phase_order"]  # as earlier versions wrote it
    (tmp_path / "training" / "plan.json").write_text(json.dumps(plan))
    pool = train_pool(base, train, selection, config, tmp_path, resume=True, scored=1)
    assert len(pool.members) == 1
    with pytest.raises(InputError, match=r"holds a finished pool \(pool\.json\); resume it"):
        train_pool(base, train, selection, config, tmp_path)


def test_what_a_killed_run_left_beside_a_finished_pool_is_removed(tmp_path, digits, monkeypatch):
    monkeypatch.setattr("jdkd.pool.growing.load_pool", lambda folder, *given, **how: folder)
    (tmp_path / "training" / "largest").mkdir(parents=True)
    (tmp_path / "training" / "plan.json").write_text("{}")
    (tmp_path / "pool.json").write_text("{}")
    base, config = detector(small_spec()), PoolTrainConfig(TrainConfig(steps=9))
    assert train_pool(base, *digits, config, tmp_path, topology=read(base), resume=True) == tmp_path
    assert [file.name for file in tmp_path.iterdir()] == ["pool.json"]


def test_a_folder_of_something_else_is_not_trained_in(pool, digits, tmp_path):
    kept = tmp_path / "training" / "mine.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    config = PoolTrainConfig(TrainConfig(steps=9))
    with pytest.raises(InputError, match=r"training holds mine\.txt but no plan\.json"):
        progressive_shrinking(pool.supernet, digits[0], config, kept.parent, device="cpu")
    assert [file.read_text() for file in kept.parent.iterdir()] == ["mine"]
