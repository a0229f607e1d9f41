"""Latency that can be believed: interleaved, warm, with raw samples, of the artefact that is scored."""

from jdkd.latency.cost import Cost, profile_cost
from jdkd.latency.folding import fuse_for_inference
from jdkd.latency.grid import Grid, Work, measure_grid
from jdkd.latency.protocol import QUICK, REPORTED, Schedule, measure, measure_quick
from jdkd.latency.report import LatencyReport, ModelLatency
from jdkd.latency.stages import StageProfile, profile_stages
from jdkd.latency.statistics import Latency, Ratio, bootstrap_ratio, percentile
from jdkd.latency.table import LatencyTable
from jdkd.latency.versions import measure_table

__all__ = [
    "QUICK",
    "REPORTED",
    "Cost",
    "Grid",
    "Latency",
    "LatencyReport",
    "LatencyTable",
    "ModelLatency",
    "Ratio",
    "Schedule",
    "StageProfile",
    "Work",
    "bootstrap_ratio",
    "fuse_for_inference",
    "measure",
    "measure_grid",
    "measure_quick",
    "measure_table",
    "percentile",
    "profile_cost",
    "profile_stages",
]
