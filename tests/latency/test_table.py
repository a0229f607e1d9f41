"""The latency table: what layers compute is counted, and known costs are found again from measured versions."""

import copy
import json
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from jdkd.detect import read
from jdkd.detect.input_size import size_attributes
from jdkd.detect.regions import region_attributes
from jdkd.errors import InputError
from jdkd.latency import Latency, LatencyReport, LatencyTable, measure_quick, measure_table, profile_cost
from jdkd.latency import table as table_module
from jdkd.latency import versions as versions_module
from jdkd.latency.clock import CpuClock
from jdkd.latency.layers import part_of, place_of, positions, shapes_after, shapes_of
from jdkd.latency.report import ModelLatency
from jdkd.rewrite import Rewrite
from jdkd.rewrite.blocks import removable
from tests.detectors import detector, small_spec
from tests.morph.small import SIZE, parent, picture

STAGE = "backbone.body.layer2"


@pytest.fixture(scope="module")
def model():
    return detector(small_spec())


@pytest.fixture(scope="module")
def topology(model):
    return read(model, size=(64, 96))


def half(topology, names=None):
    groups = [topology[name] for name in names] if names else topology.groups
    return {group.name: range(group.units // 2) for group in groups if group.units > 1}


def computed(model, picture) -> float:
    counted = positions(model, picture)
    return sum(counted[name] * math.prod(shape) for name, shape in shapes_of(model).items() if name in counted)


@pytest.mark.parametrize("name", ["faster_rcnn", "fcos", "ssd", "pan"])
def test_places_times_weights_are_the_multiply_accumulates_that_torch_counts(name):
    model, image = copy.deepcopy(parent(name)[0]).float(), picture()[0]
    assert computed(model, image) == pytest.approx(profile_cost(model, SIZE).gmacs * 1e9, rel=1e-6)


def test_what_is_done_for_each_region_is_counted_for_as_many_as_are_proposed(free, priced, model, topology):
    table, cost = priced
    assert table.regions and {name.partition(".")[0] for name in table.of_regions} == {"roi_heads"}
    for count in (table.regions // 2, table.regions // 3):
        rewrite = Rewrite(keep=half(topology), attributes=region_attributes(model, count))
        child = rewrite.apply(model, topology)
        counted = positions(child, torch.rand(3, 64, 96))
        places = table.places(shapes_of(child), 64, count)
        assert places == pytest.approx({name: counted[name] for name in places}, rel=0.02)
        features = table.features(model, topology, rewrite)
        assert features == table.features(child) and features["regions"] == count
        assert table.ratio(features) == pytest.approx(cost(child) / cost(model), rel=0.03)
    assert [row["regions"] for row, _ in table.rows[-2:]] == [table.regions // 2, table.regions // 4]


@pytest.mark.parametrize("name", ["faster_rcnn", "pan"])
def test_shapes_are_foreseen_of_cuts_of_growth_and_of_blocks(name):
    model, topology = parent(name)
    longer = {
        blocks.name: [*range(len(blocks.blocks)), blocks.copied, blocks.copied] for blocks in topology.block_lists
    }
    shorter = {blocks.name: range(len(blocks.blocks) - 1) for blocks in topology.block_lists if len(blocks.blocks) > 1}
    grown = {group.name: 3 for group in topology.groups if group.grows}
    for rewrite in (
        Rewrite(keep=half(topology), blocks=longer),
        Rewrite(keep=half(topology), blocks=shorter),
        Rewrite(extra=grown),
    ):
        child = rewrite.apply(model, topology)
        foreseen = shapes_after(model, topology, rewrite)
        assert sorted(foreseen.values()) == sorted(shapes_of(child).values())
        assert foreseen != shapes_of(model)


def test_a_layer_of_a_new_block_runs_where_its_neighbours_did():
    known = ["stem.weight", "stage.0.conv.weight", "stage.1.conv.weight"]
    assert place_of("stage.7.conv.weight", ["stage"], known) == "stage.1.conv.weight"
    assert place_of("stage.1+2.conv.weight", ["stage"], known) == "stage.1.conv.weight"
    assert place_of("stage.7.other.weight", ["stage"], known) is None and place_of("x.weight", ["stage"], known) is None
    assert part_of("stage.1.conv", ["stage"]) == "stage" and part_of("stem", []) == "stem"
    assert part_of("head.towers.0.3", []) == "head.towers" and part_of("a.b.c.conv", ["a"]) == "a"


@pytest.fixture(scope="module")
def priced(model, topology):
    """Instead of being timed, models are priced: a fixed cost, and another for each part's multiply-accumulates."""
    image = torch.rand(3, 64, 96)

    def cost(model) -> float:
        counted = positions(model, image)
        macs = {}
        for name, shape in shapes_of(model).items():
            where = part_of(name.rpartition(".")[0], [f"backbone.body.layer{k}" for k in (1, 2, 3, 4)])
            macs[where] = macs.get(where, 0.0) + counted[name] * math.prod(shape)
        return 4.0 + sum(value / 1e6 * (3 if "layer" in where else 1) for where, value in macs.items())

    def measure(models, images, **options):
        times = {name: ModelLatency(Latency((cost(model),) * 2)) for name, model in models.items()}
        return LatencyReport(times, {}, {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(versions_module, "measure_quick", measure)
        patch.setattr(versions_module, "fuse_for_inference", lambda model: model)
        return measure_table(model, topology, [image]), cost


@pytest.fixture
def free(monkeypatch):
    """Next to no ridge: costs are solved when they are first asked for."""
    monkeypatch.setattr(table_module, "RIDGE", 1e-6)


def test_costs_that_are_known_are_found_and_predict_other_rewrites(free, priced, model, topology):
    table, cost = priced
    assert table.fixed == pytest.approx(4 / cost(model), rel=0.05)
    assert table.costs["backbone.body.layer1"] == pytest.approx(3 * table.costs["roi_heads.box_head"], rel=0.2)
    assert table.predict(model) == pytest.approx(1, rel=0.01)
    inner = [group.name for group in topology.inner]
    rewrites = [
        Rewrite(keep=half(topology, inner)),
        Rewrite(keep=half(topology), attributes=size_attributes(model, 32)),
        Rewrite(blocks={STAGE: (0, 0, 0)}),
        Rewrite(keep=half(topology, inner[::2]), blocks={STAGE: ()}),
    ]
    for rewrite in rewrites:
        child = rewrite.apply(model, topology)
        predicted = table.predict(model, topology, rewrite)
        assert predicted == pytest.approx(cost(child) / cost(model), rel=0.03)
        assert table.predict(child) == pytest.approx(predicted, rel=1e-6)  # a descendant speaks for itself


def test_what_is_measured_reaches_down_to_what_no_cut_saves(priced, model, topology):
    table, _ = priced
    left = {blocks.name: range(len(blocks.blocks) - removable(model, blocks)) for blocks in topology.block_lists}
    shortest = table.features(Rewrite(blocks=left).apply(model, topology))
    measured = [row for row, _ in table.rows if row["layers"] == shortest["layers"] < table.rows[0][0]["layers"]]
    assert len(measured) == 2, "all blocks are gone that may go: with all channels, and with few"
    whole, slim = sorted(measured, key=lambda row: -row["outputs"])
    assert whole == shortest and slim["outputs"] < 0.8 * whole["outputs"]
    assert min(ratio for _, ratio in table.rows) == next(ratio for row, ratio in table.rows if row == slim)


def test_a_table_is_json_and_learns_from_what_is_measured(free, priced, model, topology):
    table, _ = priced
    assert len(table.kept) > 1, "how many boxes each NMS of the base keeps"
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table
    rewrites = [Rewrite(keep=half(topology, [group.name])) for group in topology.groups]
    slower = [(table.features(model, topology, each), 1.1 * table.predict(model, topology, each)) for each in rewrites]
    better = table.corrected(slower)
    assert all(abs(better.ratio(features) / ratio - 1) < 0.03 for features, ratio in slower)
    assert better.corrected(slower) == better
    assert better.corrected([]) == table and table.corrected(slower[:1]).factor < better.factor < 1.1
    assert LatencyTable.from_json(json.loads(json.dumps(better.to_json()))) == better
    for row in ([], [[table.rows[0][0], math.nan]], [[table.rows[0][0], 0.0]], [[{"a": math.inf}, 1.0]]):
        with pytest.raises(ValueError, match="no measured latencies"):
            LatencyTable.from_json({**table.to_json(), "rows": row})


def test_detectors_without_an_input_size_and_with_one_block_have_tables(monkeypatch):
    monkeypatch.setattr(versions_module, "SHARES", (0.5,))
    quick = lambda *given, **how: measure_quick(*given, **how | {"warmup_limit": 0})  # noqa: E731
    monkeypatch.setattr(versions_module, "measure_quick", quick)
    for name in ("ssd", "pan"):
        model, topology = parent(name)
        table = measure_table(model, topology, [picture()[0].double()], rounds=1, clock=CpuClock())
        assert table.sizes == (0,) and table.ratio(table.rows[0][0]) == pytest.approx(1, abs=0.5)
        assert 0 < table.predict(model, topology, Rewrite(keep=half(topology))) <= table.predict(model)


def test_a_topology_of_another_model_and_what_is_no_image_are_refused(model, topology):
    with pytest.raises(InputError, match="read off another model"):
        measure_table(parent("fcos")[0], topology, picture())
    with pytest.raises(InputError, match="image"):
        measure_table(model, topology, [])
    with pytest.raises(InputError, match="image"):
        measure_table(model, topology, [torch.rand(64, 64)])


def test_processor_time_does_not_count_what_is_waited_for():
    import time

    assert CpuClock().time(lambda: time.sleep(0.05)) < 20


def test_a_machine_that_slows_down_between_two_measurements_is_not_taken_for_a_costly_nms(model, monkeypatch):
    slow, steady, measured = [1.0, 1.0, 1.6, 1.0, 1.0, 1.0], [], []  # the third, with NMS, met other work

    class Runtime:
        @contextmanager
        def steady_nms(self, counts):
            steady.append(counts)
            yield
            steady.pop()

    def measure(models, images, **options):
        measured.append(bool(steady))
        cost = slow[len(measured) - 1] * (10.0 if steady else 11.0)
        return LatencyReport({name: ModelLatency(Latency((cost,) * 2)) for name in models}, {}, {})

    monkeypatch.setattr(versions_module, "measure_quick", measure)
    assert versions_module._nms_share(model, [], (7,), {"runtime": Runtime()}) == pytest.approx(0.1)
    assert measured == [False, True] * versions_module.TURNS


def test_what_nms_takes_stands_beside_what_was_measured_without_it():
    table = LatencyTable((), (0,), {}, (({}, 1.0),), nms=0.25)
    assert table.with_nms(1.0) == 1.0 and table.with_nms(0.5) == pytest.approx(0.6)
    assert LatencyTable.from_json(table.to_json()).nms == 0.25
    two_stage = replace(table, regions=300)
    assert two_stage.with_nms(1.0) == two_stage.with_nms(1.0, 300) == 1.0
    assert two_stage.with_nms(0.5, 75) == pytest.approx((0.5 + 0.0625) / 1.25)
    for kept, saved in ((400, 0.0625), (150, 0.125), (60, 0.25)):  # boxes that the base's first NMS keeps
        few = replace(two_stage, kept=(kept, 20))
        assert few.with_nms(0.5, 75) == pytest.approx((0.5 + saved) / 1.25) and few.with_nms(1.0, 300) == 1.0


def test_a_table_of_an_earlier_version_is_told_from_a_broken_one():
    written = LatencyTable((), (0,), {}, (({}, 1.0),)).to_json()
    del written["regions"], written["of_regions"]
    with pytest.raises(ValueError, match="no regions, of_regions, as in a table of an earlier version"):
        LatencyTable.from_json(written)


def test_a_target_leaves_what_is_above_the_part_that_no_cut_saves():
    rows = tuple(({"layers": share}, 0.4 + 0.6 * share) for share in (1.0, 0.5, 0.25, 0.0))
    table = LatencyTable((), (0,), {}, rows)
    assert table.left(0.7) == pytest.approx(0.5, abs=0.01) and table.left(0.3) == 0.0
    assert table.least == 0.4
    assert LatencyTable((), (0,), {}, (({}, 1.0),)).left(0.5) == 0.0
