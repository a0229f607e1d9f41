"""Training and scoring of detectors."""

from jdkd.train.calibrate import calibrate_bn
from jdkd.train.config import TrainConfig
from jdkd.train.divergence import DivergenceError
from jdkd.train.engine import FitReport, fit
from jdkd.train.evaluate import Scores, evaluate

__all__ = ["DivergenceError", "FitReport", "Scores", "TrainConfig", "calibrate_bn", "evaluate", "fit"]
