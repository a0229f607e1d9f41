"""The elastic pool: spaces, supernets that run in place, and their training."""

import json
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from jdkd.detect import detector as families
from jdkd.detect import narrowed, read, save
from jdkd.errors import InputError, ModelError
from jdkd.graph import Topology
from jdkd.nn.elastic import Elastic
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
from jdkd.pool.shrinking import _frozen_largest
from jdkd.rewrite import describe
from jdkd.train import TrainConfig
from tests.detectors import assert_same, detector, outputs, small_spec


@pytest.fixture(params=["basic", "bottleneck"])
def base(request):
    return detector(small_spec(request.param))


def grown(base, **how) -> tuple[Space, torch.nn.Module, Topology]:
    """A space around a detector, and the largest network of it."""
    topology = read(base)
    space = Space.from_base(topology, **{"width": 2.0, **how})
    return space, *grow_base(base, topology, space)


def supernet_of(base, seed: int = 3) -> Supernet:
    """A supernet whose weights are anything but those that it was born with."""
    space, largest, topology = grown(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in largest.state_dict().items():
            if tensor.dim() == 1:
                low = 0.3 if name.endswith(("weight", "running_var")) else -0.2
                tensor.uniform_(low, low + 1 if low > 0 else 0.2, generator=generator)
            elif tensor.dim():
                tensor.normal_(0, (1 / tensor[0].numel()) ** 0.5, generator=generator)
    return Supernet(space, largest, topology)


def test_a_space_spans_from_the_base_to_the_largest_network(base):
    space, largest, _ = grown(base)
    assert space.depths == ((1, 2),) * 4 and space.widths == (0.5, 0.75, 1.0)  # the first blocks project, and stay
    assert space.largest == Subnet((2,) * 4, (1.0,) * 4)
    assert Supernet(space, largest).extract(space.smallest).architecture == base.architecture
    inner = largest.backbone.body.layer1[0].conv1.out_channels
    assert inner == 2 * base.backbone.body.layer1[0].conv1.out_channels
    assert space.top_fraction(0.0).sample(random.Random(0)) == space.largest
    half = space.top_fraction(0.5)
    assert half.widths == space.widths[1:] and {len(choices) for choices in half.depths} == {2}
    assert Space.from_json(json.loads(json.dumps(space.to_json()))) == space


def test_widths_that_would_have_one_name_are_refused():
    """By its name a subnet is measured, shown and exported."""
    topology = read(detector(small_spec()))
    assert len(Space.from_base(topology, steps=20).widths) == 20
    for how in ({"steps": 60}, {"width": 1.01}):
        with pytest.raises(InputError, match=r"widths up to .* times the base's lie so near .*; give fewer widths"):
            Space.from_base(topology, **how)


def test_the_default_space_is_one_block_deeper_and_half_as_wide_again():
    base = narrowed(families("fasterrcnn", "resnet18", ["a"]), 0.25)
    space, largest, _ = grown(base, width=1.5)
    assert space == Space.from_base(read(base)) and len(space.widths) == 3
    assert [len(getattr(largest.backbone.body, f"layer{k}")) for k in (1, 2, 3, 4)] == [3, 3, 3, 3]
    for name, parameter in base.named_parameters():
        if name.startswith("backbone.body.layer") and name.endswith("conv1.weight"):
            assert largest.get_parameter(name).shape[0] == 8 * int(1.5 * parameter.shape[0] / 8 + 0.5)


def test_a_mutation_is_one_or_two_notches_away_and_stays_inside():
    space = grown(detector(small_spec()))[0]
    rng = random.Random(0)
    subnet, notches = space.largest, set()
    for _ in range(50):
        other = space.mutate(subnet, rng)
        changed = sum(a != b for a, b in zip(other.depths + other.widths, subnet.depths + subnet.widths, strict=True))
        notches.add(changed)
        space.check(other)
        assert all(width in space.widths for width in other.widths)
        subnet = other
    assert notches == {1, 2}


def test_the_pool_starts_as_the_base(base):
    _, largest, _ = grown(base)
    assert_same(outputs(largest), outputs(base))
    assert sum(p.numel() for p in largest.parameters()) > 1.5 * sum(p.numel() for p in base.backbone.body.parameters())


def test_a_subnet_in_place_equals_its_extraction(base):
    supernet = supernet_of(base)
    space, rng = supernet.space, random.Random(1)
    whole = outputs(supernet.model)
    for subnet in (space.smallest, space.sample(rng), space.sample(rng)):
        supernet.activate(subnet)
        alone = supernet.extract(subnet)
        assert_same(outputs(alone), outputs(supernet.model))
        known = alone.architecture
        assert describe(alone, known.builder, known.arguments, classes=known.classes) == known
        assert not any(isinstance(module, Elastic) for module in alone.modules())
    supernet.activate(space.largest)
    assert_same(outputs(supernet.model), whole)
    own, shared = supernet.extract(space.largest), dict(supernet.model.named_parameters())
    assert all(parameter is not shared[name] for name, parameter in own.named_parameters())


def test_sorting_puts_important_channels_first_and_changes_no_output(base):
    supernet = supernet_of(base)
    before = outputs(supernet.model)
    reader = supernet.model.backbone.body.layer3[1].conv2.weight
    unsorted = reader.abs().sum((0, 2, 3))
    assert not (unsorted.diff() <= 0).all()
    supernet.sort_channels()
    assert_same(outputs(supernet.model), before)
    assert (reader.abs().sum((0, 2, 3)).diff() <= 1e-5).all()


def test_only_what_is_active_gets_a_gradient(base):
    supernet = supernet_of(base)
    supernet.model.train()
    supernet.activate(supernet.space.smallest)
    supernet.model.backbone(torch.rand(2, 3, 64, 64))["0"].sum().backward()
    body = supernet.model.backbone.body
    width = base.backbone.body.layer1[0].conv1.out_channels
    gradient = body.layer1[0].conv1.weight.grad
    assert gradient[:width].abs().sum() > 0 and gradient[width:].abs().sum() == 0
    assert body.layer1[2].conv1.weight.grad is None, "the third block did not run"


@pytest.mark.parametrize(
    ("subnet", "says"),
    [
        (Subnet((4, 2, 2, 2), (1.0,) * 4), "stage 1 asks for 4 blocks at width 1 and the supernet has 2"),
        (Subnet((2, 2, 2, 2), (1.0, 1.5, 1.0, 1.0)), "stage 2 asks for 2 blocks at width 1.5"),
        (Subnet((2, 2), (1.0, 1.0)), "2 depths and 2 widths for 4 stages"),
    ],
)
def test_a_subnet_wider_than_its_supernet_is_refused(subnet, says):
    supernet = supernet_of(detector(small_spec()))
    with pytest.raises(InputError, match=says):
        supernet.activate(subnet)
    with pytest.raises(InputError, match=says):
        supernet.extract(subnet)
    assert supernet.active == supernet.space.largest


def test_a_space_of_another_detector_is_refused():
    _, largest, _ = grown(detector(small_spec()), extra_depth=0)
    deeper = Space.from_base(read(largest))
    with pytest.raises(InputError, match=r"has \[2, 2, 2, 2\] blocks in its stages and this detector \[1, 1, 1, 1\]"):
        Supernet(deeper, largest)


def test_the_phases_open_depth_and_width_together():
    assert len(PHASES) >= 3 and PHASES[0].top_fraction == 0 and PHASES[-1].top_fraction == 1
    assert [phase.top_fraction for phase in PHASES] == sorted(phase.top_fraction for phase in PHASES)
    config = PoolTrainConfig(TrainConfig(steps=100, seed=5))
    assert sum(config.phase_config(i).steps * (1 + phase.subnets) for i, phase in enumerate(PHASES)) == pytest.approx(
        100, abs=3
    )
    assert len({config.phase_config(i).seed for i in range(len(PHASES))}) == len(PHASES)
    assert [config.phase_config(i).lr / config.train.lr for i in range(len(PHASES))] == [each.lr for each in PHASES]
    least = PoolTrainConfig(TrainConfig(steps=1))
    assert all(least.phase_config(i).steps == 1 for i in range(len(PHASES))), "a step at least"
    for shares in (0.4, 0.6):
        with pytest.raises(InputError, match=f"phases has shares that are {2 * shares:g} together; let them be 1"):
            PoolTrainConfig(TrainConfig(steps=9), (replace(PHASES[0], share=shares), replace(PHASES[1], share=shares)))


CONFIG = PoolTrainConfig(
    TrainConfig(steps=6, batch_size=2, lr=1e-4, checkpoint_every=1),
    phases=(Phase("largest", 1 / 3, 0.0, 0, 1.0), Phase("full", 2 / 3, 1.0, 1, 0.5)),
    head_weight=1.0,
)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A base, its pool, and the folder of that, which nobody changes."""
    train, selection = digits
    base, folder = detector(small_spec(classes=train.classes)), tmp_path_factory.mktemp("pool") / "whole"
    return base, train_pool(base, train, selection, CONFIG, folder, scored=3), folder


def test_an_interrupted_pool_ends_as_an_uninterrupted_one(digits, trained, tmp_path):
    (train, selection), (base, whole, folder) = digits, trained
    assert not (folder / "training").exists()

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
    subnet = read.members[-1].teacher
    assert_same(outputs(read.teacher(subnet)), outputs(whole.teacher(subnet)))
    assert (read.trained_on, read.scored_on) == (train.fingerprint, selection.fingerprint)
    subnets = {member.teacher for member in read.members}
    read.score_members([*subnets, *subnets], train)
    assert {member.teacher for member in read.members} == subnets and len(read.members) == len(subnets)
    assert read.scored_on == train.fingerprint and read.members != whole.members


def test_a_frozen_network_that_a_kill_left_half_written_is_written_again(tmp_path, monkeypatch):
    largest = detector(small_spec())
    supernet = SimpleNamespace(space=SimpleNamespace(largest=None), extract=lambda subnet: largest)
    monkeypatch.setattr("jdkd.pool.shrinking.calibrate", lambda model, *how: model)
    save(tmp_path, largest)
    (tmp_path / "architecture.json").unlink()
    again = _frozen_largest(supernet, None, TrainConfig(steps=1), tmp_path, "cpu")
    assert again.architecture == largest.architecture


def test_a_teacher_that_finds_nothing_finite_scores_0_and_says_so(digits, monkeypatch):
    def evaluate(*given, **options):
        raise ModelError("nothing is left to score.")

    train, selection = digits
    base = detector(small_spec(classes=train.classes))
    space, largest, topology = grown(base)
    pool = TeacherPool(Supernet(space, largest, topology), train, 2, 0, "cpu")
    monkeypatch.setattr("jdkd.pool.elastic_pool.evaluate", evaluate)
    with pytest.warns(Notice, match=r"scores 0: nothing is left to score\."):
        assert pool.score(space.smallest, selection).map == 0.0


def test_a_pool_that_cannot_teach_the_base_is_refused(digits, trained, tmp_path):
    (train, _), (base, _, folder) = digits, trained
    with pytest.raises(InputError, match="no finished teacher pool"):
        load_pool(tmp_path, base, train)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    other = detector(small_spec(classes=train.classes, fpn=24))
    with pytest.raises(InputError, match=r"\[16, 16, 16, 16, 16\] and the base \[24, 24, 24, 24, 24\]"):
        load_pool(tmp_path, other, train)
    other = detector(small_spec(classes=train.classes[::-1]))
    with pytest.raises(InputError, match=r"has the classes .* and the base"):
        load_pool(tmp_path, other, train)
    facts = json.loads((tmp_path / "pool.json").read_text())
    del facts["space"]["growth"]  # as earlier versions wrote it
    (tmp_path / "pool.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="no finished teacher pool of this version"):
        load_pool(tmp_path, base, train)


def test_only_a_detector_that_can_be_built_again_has_a_pool(digits, tmp_path):
    base = detector(small_spec())
    del base.architecture
    with pytest.raises(InputError, match="a teacher pool takes a detector that carries its architecture"):
        train_pool(base, *digits, CONFIG, tmp_path)
