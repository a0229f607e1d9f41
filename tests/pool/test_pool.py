"""The elastic pool: spaces, supernets that run in place, and their training."""

import random

import pytest
import torch

from jdkd.errors import InputError, ModelError
from jdkd.notices import Notice
from jdkd.pool import (
    PHASES,
    Phase,
    PoolTrainConfig,
    Space,
    Subnet,
    Supernet,
    TeacherPool,
    grow_base,
    load_pool,
    train_pool,
)
from jdkd.train import TrainConfig
from tests.detectors import assert_same, detector, outputs, small_spec


@pytest.fixture(params=["basic", "bottleneck"])
def base(request):
    return detector(small_spec(request.param))


def space_of(base) -> Space:
    return Space.from_base(base.spec, extra_depth=1, width=2.0)


def test_a_space_spans_from_the_base_to_the_largest_network(base):
    space = space_of(base)
    assert space.largest == Subnet((3,) * 4, (1.0,) * 4)
    assert space.spec(space.smallest) == base.spec
    assert space.largest_spec.stages[0].blocks[0][0] == 2 * base.spec.stages[0].blocks[0][0]
    assert space.top_fraction(0.0).sample(random.Random(0)) == space.largest
    half = space.top_fraction(0.5)
    assert half.widths == space.widths[1:] and {len(choices) for choices in half.depths} == {2}
    assert Space.from_json(space.largest_spec, space.to_json()) == space


def test_a_mutation_is_one_or_two_notches_away_and_stays_inside():
    space = space_of(detector(small_spec()))
    rng = random.Random(0)
    subnet = space.largest
    for _ in range(50):
        other = space.mutate(subnet, rng)
        changed = sum(a != b for a, b in zip(other.depths + other.widths, subnet.depths + subnet.widths, strict=True))
        assert 1 <= changed <= 2
        space.check(other)
        assert all(width in space.widths for width in other.widths)
        subnet = other


def test_the_pool_starts_as_the_base(base):
    space = space_of(base)
    assert_same(outputs(grow_base(base, space)), outputs(base))


def test_a_subnet_in_place_equals_its_extraction(base):
    space = space_of(base)
    supernet = Supernet(space, detector(space.largest_spec, seed=3))
    rng = random.Random(1)
    for subnet in (space.largest, space.smallest, space.sample(rng), space.sample(rng)):
        supernet.activate(subnet)
        assert_same(outputs(supernet.extract(subnet)), outputs(supernet.model))
    supernet.activate(space.largest)
    assert_same(outputs(supernet.model), outputs(detector(space.largest_spec, seed=3)))


def test_sorting_puts_important_channels_first_and_changes_no_output(base):
    space = space_of(base)
    supernet = Supernet(space, detector(space.largest_spec, seed=3))
    before = outputs(supernet.model)
    supernet.sort_channels()
    assert_same(outputs(supernet.model), before)
    reader = supernet.model.backbone.body.layer3[1].conv2.weight
    strength = reader.abs().sum((0, 2, 3))
    assert (strength.diff() <= 1e-5).all()
    unsorted = detector(space.largest_spec, seed=3).backbone.body.layer3[1].conv2.weight.abs().sum((0, 2, 3))
    assert not (unsorted.diff() <= 0).all()


def test_only_what_is_active_gets_a_gradient(base):
    space = space_of(base)
    supernet = Supernet(space, detector(space.largest_spec))
    supernet.model.train()
    supernet.activate(space.smallest)
    supernet.model.backbone(torch.rand(2, 3, 64, 64))["0"].sum().backward()
    body = supernet.model.backbone.body
    width = space.inner_widths(space.smallest, 0)[0][0]
    gradient = body.layer1[0].conv1.weight.grad
    assert gradient[:width].abs().sum() > 0 and gradient[width:].abs().sum() == 0
    assert body.layer1[2].conv1.weight.grad is None, "the third block did not run"


@pytest.mark.parametrize(
    ("subnet", "says"),
    [
        (Subnet((4, 2, 2, 2), (1.0,) * 4), "stage 1 asks for 4 blocks at width 1 and the supernet has 3"),
        (Subnet((2, 2, 2, 2), (1.0, 1.5, 1.0, 1.0)), "stage 2 asks for 2 blocks at width 1.5"),
        (Subnet((2, 2), (1.0, 1.0)), "2 depths and 2 widths for 4 stages"),
    ],
)
def test_a_subnet_wider_than_its_supernet_is_refused(subnet, says):
    space = space_of(detector(small_spec()))
    supernet = Supernet(space, detector(space.largest_spec))
    with pytest.raises(InputError, match=says):
        supernet.activate(subnet)
    assert supernet.active == space.largest


def test_the_phases_open_depth_and_width_together():
    assert len(PHASES) >= 3 and PHASES[0].top_fraction == 0 and PHASES[-1].top_fraction == 1
    assert [phase.top_fraction for phase in PHASES] == sorted(phase.top_fraction for phase in PHASES)
    config = PoolTrainConfig(TrainConfig(steps=100, seed=5))
    assert sum(config.phase_config(i).steps * (1 + phase.subnets) for i, phase in enumerate(PHASES)) == pytest.approx(
        100, abs=3
    )
    assert len({config.phase_config(i).seed for i in range(len(PHASES))}) == len(PHASES)


CONFIG = PoolTrainConfig(
    TrainConfig(steps=6, batch_size=2, lr=1e-4, checkpoint_every=1),
    phases=(Phase("largest", 1 / 3, 0.0, 0, 1.0), Phase("full", 2 / 3, 1.0, 1, 0.5)),
    head_weight=1.0,
)


def test_an_interrupted_pool_ends_as_an_uninterrupted_one(digits, tmp_path):
    train, selection = digits
    base = detector(small_spec(classes=train.classes))
    whole = train_pool(base, train, selection, CONFIG, tmp_path / "whole", scored=3)
    assert not (tmp_path / "whole" / "training").exists()

    class StopError(Exception):
        pass

    def stop(what, done, total, values):
        if what == "pool: full" and done == 1:
            raise StopError

    with pytest.raises(StopError):
        train_pool(base, train, selection, CONFIG, tmp_path / "cut", scored=3, progress=stop)
    again = train_pool(base, train, selection, CONFIG, tmp_path / "cut", scored=3, resume=True)
    for name, tensor in whole.supernet.model.state_dict().items():
        assert torch.equal(tensor, again.supernet.model.state_dict()[name]), name
    read = load_pool(tmp_path / "cut", base, train)
    assert read.members == whole.members and len(read.members) == 3
    assert [m.map for m in read.members] == sorted((m.map for m in read.members), reverse=True)
    subnet = read.members[-1].subnet
    assert_same(outputs(read.teacher(subnet)), outputs(whole.teacher(subnet)))
    assert (read.trained_on, read.scored_on) == (train.fingerprint, selection.fingerprint)
    subnets = {member.subnet for member in read.members}
    read.score_members([*subnets, *subnets], base, train)
    assert {member.subnet for member in read.members} == subnets and len(read.members) == len(subnets)
    assert read.scored_on == train.fingerprint and read.members != whole.members


def test_a_teacher_that_finds_nothing_finite_scores_0_and_says_so(digits, monkeypatch):
    def evaluate(*given, **options):
        raise ModelError("nothing is left to score.")

    train, selection = digits
    base = detector(small_spec(classes=train.classes))
    space = space_of(base)
    pool = TeacherPool(Supernet(space, grow_base(base, space)), train, 2, 0, "cpu")
    monkeypatch.setattr("jdkd.pool.elastic_pool.evaluate", evaluate)
    with pytest.warns(Notice, match=r"scores 0: nothing is left to score\."):
        assert pool.score(space.smallest, base, selection).map == 0.0


def test_a_pool_that_cannot_teach_the_base_is_refused(digits, tmp_path):
    train, selection = digits
    base = detector(small_spec(classes=train.classes))
    with pytest.raises(InputError, match="no finished teacher pool"):
        load_pool(tmp_path, base, train)
    train_pool(base, train, selection, CONFIG, tmp_path, scored=1)
    other = detector(small_spec(classes=train.classes, fpn=24))
    with pytest.raises(InputError, match="fpn 16 and the base 24"):
        load_pool(tmp_path, other, train)


def test_only_a_detector_with_a_spec_can_grow(base):
    with pytest.raises(InputError, match=r"grow_base takes a detector .* got a Linear without one"):
        grow_base(torch.nn.Linear(1, 1), Space.from_base(base.spec))
