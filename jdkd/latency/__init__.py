"""Latency that can be believed: interleaved, warm, with raw samples, of the artefact that is scored."""

from jdkd.latency.cost import Cost, count
from jdkd.latency.deployable import deployable
from jdkd.latency.protocol import QUICK, REPORTED, Schedule, measure, quick
from jdkd.latency.report import LatencyReport, ModelLatency
from jdkd.latency.statistics import Latency, Ratio, bootstrap_ratio, percentile

__all__ = [
    "QUICK",
    "REPORTED",
    "Cost",
    "Latency",
    "LatencyReport",
    "ModelLatency",
    "Ratio",
    "Schedule",
    "bootstrap_ratio",
    "count",
    "deployable",
    "measure",
    "percentile",
    "quick",
]
