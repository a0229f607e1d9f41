import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from jdkd.errors import InputError
from jdkd.latency.clock import environment
from jdkd.latency.protocol import Schedule, interleave
from jdkd.latency.report import LatencyReport, ModelLatency, pooled, require_same_environment
from jdkd.latency.statistics import Latency
from jdkd.latency.watching import CpuWatch, NotWatched, NvmlWatch, slowed, unreadable, watch_for


class ScriptedWatch:
    """Says what a machine said, reading after reading."""

    name = "scripted"

    def __init__(self, *readings):
        self.readings = list(readings)

    def read(self):
        return self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]


def reading(mhz=2000.0, throttled=(), events=0, stolen=0, ticks=0):
    counts = {"thermal events": events}
    return {"mhz": mhz, "throttled": list(throttled), "counts": counts, "stolen": stolen, "ticks": ticks}


class SteadyClock:
    name = "steady"

    def time(self, call):
        call()
        return 1.0


def timed(*readings, monkeypatch):
    """A report of a run of as many blocks, one a round."""
    monkeypatch.setattr("jdkd.latency.protocol.BLOCK_SECONDS", 0.0)
    calls = {"end_to_end": {"base": lambda index: None, "student": lambda index: None}}
    schedule = Schedule(rounds=len(readings) - 1, min_seconds=0, warmup_seconds=0, warmup_limit=0)
    samples, run = interleave(calls, 1, schedule, SteadyClock(), watch=ScriptedWatch(*readings))
    models = {name: ModelLatency(Latency(tuple(samples["end_to_end"][name]))) for name in ("base", "student")}
    return LatencyReport(models, {"device": "cpu"}, {"runs": [run | {"stable": True}]})


def test_clocks_are_read_before_the_first_round_and_after_every_block(monkeypatch):
    report = timed(*[reading(mhz=2000 + k) for k in range(4)], monkeypatch=monkeypatch)
    (run,) = report.protocol["runs"]
    assert [each["mhz"] for each in run["readings"]] == [2000, 2001, 2002, 2003] and run["block_ends"] == [1, 2, 3]
    assert report.warnings() == []


def test_a_block_is_as_many_rounds_as_take_its_seconds(monkeypatch):
    now = itertools.count()
    monkeypatch.setattr("jdkd.latency.protocol.BLOCK_SECONDS", 20)
    monkeypatch.setattr("jdkd.latency.protocol.time", SimpleNamespace(perf_counter=lambda: next(now)))
    calls = {"end_to_end": {"base": lambda index: None}}
    schedule = Schedule(rounds=40, min_seconds=0, max_seconds=1e6, warmup_seconds=0, warmup_limit=0)
    run = interleave(calls, 1, schedule, SteadyClock(), watch=ScriptedWatch(*[reading()] * 9))[1]
    first, second, *_ = run["block_ends"]
    assert first > 5 and second - first > 5, "the clock is looked at twice a round"


@pytest.mark.parametrize(
    ("worse", "said"),
    [
        (reading(mhz=1500), "the clock fell to 1500 of 2000 MHz in 1 of 3 blocks"),
        (reading(throttled=["software thermal slowdown"]), "throttled (software thermal slowdown) in 1 of 3 blocks"),
        (reading(events=3), "thermal events in 1 of 3 blocks"),
        (reading(stolen=30, ticks=100), "other guests took more than 5% of the processors in 1 of 3 blocks"),
    ],
)
def test_a_planted_throttle_is_reported(monkeypatch, worse, said):
    after = reading(events=worse["counts"]["thermal events"], stolen=worse["stolen"], ticks=worse["ticks"])
    report = timed(reading(), reading(), worse, after, monkeypatch=monkeypatch)
    (warning,) = report.warnings()
    assert warning == f"{said}: compare ratios, not times" and report.to_json()["warnings"] == [warning]


def test_of_several_processes_the_one_that_was_slowed_down_is_named(monkeypatch):
    good = timed(reading(), reading(), monkeypatch=monkeypatch)
    bad = timed(reading(), reading(throttled=["hardware slowdown"]), monkeypatch=monkeypatch)
    (warning,) = pooled([good, bad]).warnings()
    assert warning.startswith("process 2: throttled (hardware slowdown)")


def test_a_changed_environment_is_refused(monkeypatch):
    report = timed(reading(), reading(), monkeypatch=monkeypatch)
    moved = replace(report, environment={"device": "cpu", "threads": 2})
    with pytest.raises(
        InputError, match=r"process 1 and process 2 .*different environments.* threads was None and is 2"
    ):
        pooled([report, moved])


def test_processors_of_one_name_and_other_models_are_other_environments(monkeypatch, tmp_path):
    found = []
    for model in (17, 1):
        file = tmp_path / f"{model}"
        file.write_text(f"model name\t: AMD EPYC\ncpu family\t: 25\nmodel\t\t: {model}\nstepping\t: 1\n\nmodel\t: 5\n")
        monkeypatch.setattr("jdkd.latency.clock.CPUINFO", file)
        found.append(environment(torch.device("cpu")))
    assert [each["device_name"] for each in found] == ["AMD EPYC"] * 2
    assert found[0]["processor"] == "cpu family 25 model 17 stepping 1" and found[0]["cpu_capability"]
    with pytest.raises(InputError, match=r"processor was cpu family 25 model 17 .* and is cpu family 25 model 1 "):
        require_same_environment(*found, "then", "now")


def linux(root, cores=2, khz=2_000_000, heat=0, quota=0, stolen=0):
    for core in range(cores):
        for file, value in (("cpufreq/scaling_cur_freq", khz), ("thermal_throttle/core_throttle_count", heat)):
            path = root / f"sys/devices/system/cpu/cpu{core}" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")
    (root / "sys/fs/cgroup").mkdir(parents=True, exist_ok=True)
    (root / "sys/fs/cgroup/cpu.stat").write_text(f"usage_usec 5\nnr_throttled {quota}\n")
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/stat").write_text(f"cpu  10 0 10 70 0 0 0 {stolen} 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")


def test_what_linux_shows_of_a_cpu_is_read(tmp_path):
    watch = CpuWatch(tmp_path, cores=[0, 1])
    linux(tmp_path)
    before = watch.read()
    assert before["mhz"] == 2000 and before["counts"] == {
        "thermal events": 0, "periods cut by the container's quota": 0,
    }  # fmt: skip
    linux(tmp_path, khz=1_000_000, heat=1, quota=2, stolen=60)
    assert len(slowed([before, watch.read()])) == 4 and unreadable([before]) == []


def test_what_a_machine_does_not_show_is_named(tmp_path):
    nothing = CpuWatch(tmp_path, cores=[0]).read()
    assert unreadable([nothing]) == [
        "clocks", "thermal events", "periods cut by the container's quota", "stolen time",
    ]  # fmt: skip
    assert slowed([nothing, nothing]) == []
    unwatched = NotWatched("nvidia-ml-py is not installed")
    assert unreadable([unwatched.read()]) == ["clocks", "throttling"] and slowed([{}, {}]) == []


class NVMLError(Exception):
    pass


def nvml(**changes):
    """A stand-in for pynvml."""
    calls = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 1 | 2 | 0x20,
        "nvmlDeviceGetClockInfo": lambda handle, which: 1980 if which == "sm" else 2619,
        "nvmlDeviceGetTemperature": lambda handle, which: 60,
        "nvmlDeviceGetPowerUsage": lambda handle: 350_000,
    }
    names = {"NVML_CLOCK_SM": "sm", "NVML_CLOCK_MEM": "memory", "NVML_TEMPERATURE_GPU": 0, "NVMLError": NVMLError}
    return SimpleNamespace(**calls | names | changes)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="7"))
    return torch.device("cuda")


def test_a_gpu_is_read_through_nvml_and_idleness_is_no_throttle(monkeypatch, gpu):
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    found = watch_for(gpu).read()
    assert (found["mhz"], found["memory_mhz"], found["watts"]) == (1980, 2619, 350)
    assert found["throttled"] == ["software thermal slowdown"]


@pytest.mark.parametrize("package", [nvml(nvmlSystemGetDriverVersion=lambda: "580.1"), None])
def test_the_driver_of_a_gpu_is_of_its_environment(monkeypatch, gpu, package):
    monkeypatch.setitem(sys.modules, "pynvml", package)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert environment(gpu)["driver"] == (package and "580.1")


def test_a_reading_that_a_driver_refuses_is_an_error(monkeypatch, gpu):
    def refused(handle):
        raise NVMLError("Not Supported")

    monkeypatch.setitem(sys.modules, "pynvml", nvml(nvmlDeviceGetCurrentClocksThrottleReasons=refused))
    with pytest.raises(InputError, match=r"refused nvmlDeviceGetCurrentClocksThrottleReasons \(NVMLError: Not Supp"):
        watch_for(gpu).read()


def test_a_gpu_without_the_package_is_not_watched_and_says_so(monkeypatch, gpu):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert watch_for(gpu).name == "not read: nvidia-ml-py is not installed"
    with pytest.raises(InputError, match="pip install nvidia-ml-py"):
        NvmlWatch(gpu)
