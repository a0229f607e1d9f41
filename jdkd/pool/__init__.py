"""The elastic teacher pool: its space, its supernet, its training, and its members of another make."""

from jdkd.pool.elastic_pool import TeacherPool, load_pool, save_pool
from jdkd.pool.growing import train_pool
from jdkd.pool.members import ScoredTeacher, Teacher, teacher_from_json, teacher_to_json
from jdkd.pool.phases import PHASES, Phase, PoolTrainConfig, read_phases
from jdkd.pool.shrinking import CALIBRATION_BATCHES, calibrate
from jdkd.pool.space import Space, Subnet
from jdkd.pool.spread import Spread, measure_spread
from jdkd.pool.supernet import Supernet, grow_base

__all__ = [
    "CALIBRATION_BATCHES",
    "PHASES",
    "Phase",
    "PoolTrainConfig",
    "ScoredTeacher",
    "Space",
    "Spread",
    "Subnet",
    "Supernet",
    "Teacher",
    "TeacherPool",
    "calibrate",
    "grow_base",
    "load_pool",
    "measure_spread",
    "read_phases",
    "save_pool",
    "teacher_from_json",
    "teacher_to_json",
    "train_pool",
]
