"""Where the jobs of a search are done: in this process, in several, or on a Ray cluster. It knows no detectors."""

from jdkd.execution.choosing import executor
from jdkd.execution.cluster import RayTasks
from jdkd.execution.journal import Journal
from jdkd.execution.processes import Processes
from jdkd.execution.task import Executor, InProcess, Task

__all__ = ["Executor", "InProcess", "Journal", "Processes", "RayTasks", "Task", "executor"]
