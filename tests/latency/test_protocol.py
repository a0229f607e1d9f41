import json
import math
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise, permutations

import pytest
import torch

from jdkd.errors import InputError
from jdkd.latency import Grid, LatencyReport, Schedule, fuse_for_inference, measure, measure_quick
from jdkd.latency.calls import end_to_end
from jdkd.latency.protocol import LEAST_ROUNDS, interleave, order
from jdkd.latency.runtimes import Eager


class ScriptedClock:
    """Runs the call, then says what the script says for the model that ran."""

    def __init__(self, cost):
        self.cost, self.ran, self.calls = cost, None, 0

    def time(self, call):
        call()
        self.calls += 1
        return self.cost(self.ran, self.calls)


def _calls(clock, names, log=None):
    def call_of(name):
        def call(index):
            clock.ran = name
            if log is not None:
                log.append((name, index))

        return call

    return {"end_to_end": {name: call_of(name) for name in names}}


STEADY = Schedule(rounds=4, min_seconds=0, warmup_seconds=0, warmup_limit=60, window=2)


def test_a_round_goes_there_and_back_in_an_order_of_its_own():
    orders = ["".join(order("ab", index)) for index in range(100)]
    assert {*orders} == {"abba", "baab"} and 40 < orders.count("abba") < 60
    assert orders == ["".join(order("ab", index)) for index in range(100)]
    assert len({"".join(order("abc", index)) for index in range(100)}) == 6


@pytest.mark.parametrize("names", ["abc", "abcd"])
def test_every_model_follows_every_other_one_equally_often(names):
    turns = "".join("".join(order(names, index)) for index in range(2000))
    followed = Counter(pair for pair in pairwise(turns) if len({*pair}) == 2)
    mean = sum(followed.values()) / (len(names) * (len(names) - 1))
    assert all(abs(followed[pair] / mean - 1) < 0.1 for pair in permutations(names, 2))


def test_all_models_of_a_round_see_the_same_batch_and_rounds_take_turns():
    clock, log = ScriptedClock(lambda name, calls: 1.0), []
    samples, run = interleave(_calls(clock, "ab", log), 3, STEADY, clock)
    timed = log[-4 * STEADY.rounds :]
    assert [name for name, _ in timed] == [name for index in range(4) for name in order("ab", index)]
    assert [index for _, index in timed] == [0] * 4 + [1] * 4 + [2] * 4 + [0] * 4
    assert samples == {"end_to_end": {"a": [1.0] * 8, "b": [1.0] * 8}} and run["rounds"] == 4


def test_warms_until_round_times_settle():
    settling = lambda name, calls: 1.0 + 8.0 * 0.5 ** (calls // 4)  # noqa: E731
    clock = ScriptedClock(settling)
    samples, run = interleave(_calls(clock, "ab"), 1, STEADY, clock)
    assert run["stable"] and 8 <= run["warmup_rounds"] <= 20
    assert max(samples["end_to_end"]["a"]) < 1.1


def test_gives_up_on_warming_at_the_limit_and_says_so():
    clock = ScriptedClock(lambda name, calls: float(calls))  # slower for ever
    schedule = Schedule(rounds=1, min_seconds=0, warmup_seconds=0, warmup_limit=0.01, tolerance=0)
    assert not interleave(_calls(clock, "ab"), 1, schedule, clock)[1]["stable"]


@pytest.mark.parametrize("phase", ["warmup", "min"])
def test_warming_and_timing_last_as_long_as_they_were_asked_to(phase):
    clock = ScriptedClock(lambda name, calls: 1.0)
    seconds = {"warmup_seconds": 0.0, "min_seconds": 0.0} | {f"{phase}_seconds": 0.05}
    schedule = Schedule(rounds=1, warmup_limit=60, window=1, **seconds)
    run = interleave(_calls(clock, "ab"), 1, schedule, clock)[1]
    assert run["stable"] and run["warmup_seconds" if phase == "warmup" else "seconds"] >= 0.05


def test_ends_at_the_limit_with_fewer_rounds_than_asked_for():
    clock = ScriptedClock(lambda name, calls: 1.0)
    schedule = Schedule(rounds=10**6, min_seconds=60, max_seconds=0, warmup_seconds=0, warmup_limit=0)
    samples, run = interleave(_calls(clock, "ab"), 1, schedule, clock)
    assert run["rounds"] == LEAST_ROUNDS and len(samples["end_to_end"]["a"]) == 2 * LEAST_ROUNDS


def test_models_are_placed_anew_after_every_fourth_of_what_is_asked_for():
    clock, placed = ScriptedClock(lambda name, calls: 1.0), []

    def anew(count):
        placed.append((count, clock.calls))
        return _calls(clock, "ab")

    schedule = Schedule(rounds=8, min_seconds=0, warmup_seconds=0, warmup_limit=0)
    run = interleave(_calls(clock, "ab"), 1, schedule, clock, placed=anew)[1]
    rounds = [(calls - 4 * run["warmup_rounds"]) // 4 for _, calls in placed]
    assert [count for count, _ in placed] == [1, 2, 3] and rounds == [2, 4, 6] and run["placements"] == 4


class Opened(Eager):
    """Runs detectors as they are, and opens them anew when that is asked for; `opened` says whom, in order."""

    def __init__(self):
        self.opened = []

    def prepare(self, model, batches, device, dtype):
        self.opened.append(model)
        return replace(
            super().prepare(model, batches, device, dtype),
            reopen=partial(self.prepare, *(model, batches, device, dtype)),
        )


@pytest.mark.parametrize("brief", [True, False])
def test_who_is_opened_first_is_balanced_and_the_base_again_is_opened_for_itself(model, images, brief):
    runtime, models = Opened(), {name: fuse_for_inference(model) for name in "ab"}
    measure(
        models, images, runtime=runtime, brief=brief, modes=["end_to_end"], rounds=8, min_seconds=0, warmup_seconds=0
    )
    opened = "".join(next(name for name, each in models.items() if each is one) for one in runtime.opened)
    first = "ab" if brief else "aba"  # in turn, and the base again
    later = opened[len(first) :]
    second, third, fourth = (later[start : start + len(first)] for start in range(0, len(later), len(first)))
    assert opened.startswith(first) and second == first[::-1] and fourth == third[::-1]


def test_model_only_finds_the_boxes_of_the_whole_detector(model, images):
    cpu = torch.device("cpu")
    with torch.inference_mode():
        batches = [[image] for image in images]
        artefact = Eager().prepare(model, batches, cpu, "float32")
        for index, image in enumerate(images):
            (whole,) = end_to_end(artefact.detector, batches, cpu)(index)
            (bare,) = artefact.model_only(index)
            scale = torch.tensor([image.shape[2], image.shape[1]] * 2) / torch.tensor(_resized(model, image) * 2)
            torch.testing.assert_close(bare["boxes"] * scale, whole["boxes"], rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(bare["scores"], whole["scores"])
    assert type(model.transform).__name__ == "GeneralizedRCNNTransform"


def _resized(model, image):
    height, width = model.transform([image / 255])[0].image_sizes[0]
    return [width, height]


def test_reports_both_modes_of_every_model_and_survives_json(make_detector, images):
    models = {"base": fuse_for_inference(make_detector()), "student": make_detector(8)}
    seen = []
    report = measure(
        models,
        images,
        rounds=5,
        min_seconds=0,
        warmup_seconds=0,
        warmup_limit=0.1,
        progress=lambda done, total, values: seen.append((done, total)),
    )
    for model in report.models.values():
        assert set(model.modes()) == {"end_to_end", "model_only"}
        for latency in model.modes().values():
            assert latency.n == 10 and 0 < latency.p50 <= latency.p90 <= latency.p99
    assert report.base == "base" and report.ratio("base").interval == (1.0, 1.0)
    assert set(report.control.modes()) == {"end_to_end", "model_only"} and report.control.end_to_end.n == 10
    assert report.models["base"].facts["peak_memory_bytes"] is None or report.models["base"].facts["peak_memory_bytes"]
    assert 0 < report.models["base"].facts["detections_per_image"] <= 100
    assert report.models["base"].facts["batch_norms"] == 0 and report.models["student"].facts["batch_norms"] == 4
    assert report.environment["threads"] == torch.get_num_threads()
    assert report.protocol["image_sizes"] == ["64x64", "64x80", "64x96"]
    assert seen == [(done, 5) for done in range(1, 6)]
    stored = json.loads(json.dumps(report.to_json(), sort_keys=True))
    assert LatencyReport.from_json(stored) == report


def test_quick_is_end_to_end_with_overridable_rounds(model, images):
    report = measure_quick({"base": model}, images, rounds=2, warmup_limit=0.0)
    assert set(report.models["base"].modes()) == {"end_to_end"} and report.control is None
    assert report.models["base"].end_to_end.n == 4


def test_models_are_moved_before_inference_mode_whose_parameters_could_not_be_trained(model, images, monkeypatch):
    moved_in = []
    monkeypatch.setattr(model, "to", lambda device: moved_in.append(torch.is_inference_mode_enabled()) or model)
    measure_quick({"base": model}, images, rounds=1)
    assert not moved_in[0]


def test_batches_of_several_images(model, images):
    report = measure({"base": model}, images, rounds=1, min_seconds=0, warmup_limit=0, batch_size=4)
    assert report.protocol["batch_size"] == 4 and report.models["base"].end_to_end.n == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "images is empty"),
        ({"images": [torch.zeros(1, 8, 8)]}, r"images\[0\] has shape \[1, 8, 8\]"),
        ({"images": torch.zeros(2, 1, 8, 8)}, r"images\[0\] has shape \[1, 8, 8\]"),
        ({"images": [torch.zeros(3, 8, 8, dtype=torch.int64)]}, "int64"),
        ({"models": {}}, "models is empty"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"modes": ["wall"]}, "wall"),
        ({"modes": []}, "modes has none"),
        ({"dtype": "int8", "runtime": Eager()}, "int8"),
    ],
)
def test_refuses_what_cannot_be_measured(model, images, change, message):
    with pytest.raises(InputError, match=message):
        measure(**{"models": {"base": model}, "images": images, **change})


@pytest.mark.parametrize("nothing", [{"runtimes": ()}, {"dtypes": []}, {"runtimes": "eager"}])
def test_a_grid_of_nothing_is_refused(nothing):
    with pytest.raises(InputError, match=f"--{next(iter(nothing))} is .*; give at least one name, in a list"):
        Grid(**nothing)


def test_refuses_a_model_in_training_mode(model, images):
    with pytest.raises(InputError, match="'base' is in training mode"):
        measure({"base": model.train()}, images)


def test_refuses_what_is_no_detector_and_images_that_vanish(model, images):
    with pytest.raises(InputError, match="Identity returned a Tensor for an image"):
        measure({"base": torch.nn.Identity().eval()}, images, rounds=1)
    with pytest.raises(InputError, match=r"images\[1\] is 2x900 .*raise max_size to 450"):
        measure({"base": model}, [images[0], torch.zeros(3, 2, 900)], rounds=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_times_with_events_and_replays_the_backbone_on_a_gpu(model, images):
    report = measure(
        {"base": fuse_for_inference(model)}, images, device="cuda", rounds=5, min_seconds=0, warmup_limit=1
    )
    assert report.environment["clock"] == "CUDA events"
    assert set(report.models["base"].modes()) == {"end_to_end", "model_only"}


@pytest.mark.parametrize("setting", [{"rounds": 0}, {"min_seconds": math.nan}, {"warmup_limit": -1.0}, {"window": 0}])
def test_a_schedule_without_an_end_or_a_sample_is_refused(setting):
    with pytest.raises(InputError, match=f"{next(iter(setting))} must be a number of at least"):
        Schedule(**setting)
