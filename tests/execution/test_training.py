"""A training in a worker process: interrupted, killed, carried on, and the same in the end."""

import hashlib
import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from jdkd.execution import executor
from jdkd.notices import Notice
from jdkd.train import TrainConfig, fit
from tests.execution.processes import pids, soon


@dataclass(frozen=True)
class TinyTraining:
    """Fits a line with the engine that trains detectors; its data are made up of the job's seed."""
