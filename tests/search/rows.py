"""Candidates and timings as an archive holds them, made up."""

from jdkd.pool import Subnet
from jdkd.rewrite import Architecture
from jdkd.search import Candidate, Cycle
from jdkd.search.timing import Timing

ARCHITECTURE = Architecture("my.nets:make", {"width": 8}, classes=("cat",))


def known(number=0, *, map=0.4, parent=None, **changes) -> dict:
    """Everything about a candidate but its latency."""
    facts = {
        "number": number, "id": f"{number:03d}", "parent": parent, "generation": min(number, 1), "kind": "morph",
        "action": "prune", "teacher": Subnet((2, 2, 2, 2), (1.0, 0.5, 1.0, 1.0)), "target": None,
        "architecture": ARCHITECTURE, "architecture_id": ARCHITECTURE.id, "map": map, "map50": 0.6, "steps": 5,
        "lineage_steps": 5, "cycles": (Cycle(5, 0, 10, 1e-3),), "params": 7, "gmacs": 0.5, "predicted": 0.75,
        "seconds": {"training": 1.0, "scoring": 0.5},
    }  # fmt: skip
    return facts | changes


def candidate(number=0, *, map=0.4, ratio=1.0, interval=None, **changes) -> Candidate:
    """A candidate of an architecture of its own."""
    own = {"architecture_id": f"architecture {number}"} | changes
    latency = {
        "latency_p50": 20.0 * ratio,
        "base_latency_p50": 20.0,
        "latency_ratio": ratio,
        "latency_interval": interval or (ratio, ratio),
    }
    return Candidate(**known(number, map=map, **own), **latency)


def timing(
    samples=(7.0, 7.0), base=(10.0, 10.0), *, name=ARCHITECTURE.id, stage="brief", device_name="a cpu"
) -> Timing:
    environment = {"device": "cpu", "device_name": device_name, "threads": 1, "torch": "2.11"}
    environment |= {"runtime": "eager", "runtime_version": "2.11"}
    return Timing(name, stage, environment, tuple(samples), tuple(base))
