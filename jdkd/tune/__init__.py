"""Which of several ways to compute something is the fastest on the machine at hand; see :func:`tune`."""

from jdkd.tune.regions import Job, plan
from jdkd.tune.session import Outcome, tune

__all__ = ["Job", "Outcome", "plan", "tune"]
