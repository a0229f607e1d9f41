"""The elastic teacher pool: its space, its supernet, its training."""

from jdkd.pool.elastic_pool import ScoredSubnet, TeacherPool, load_pool, train_pool
from jdkd.pool.shrinking import PHASES, Phase, PoolTrainConfig
from jdkd.pool.space import Space, Subnet
from jdkd.pool.supernet import Supernet, grow_base

__all__ = [
    "PHASES",
    "Phase",
    "PoolTrainConfig",
    "ScoredSubnet",
    "Space",
    "Subnet",
    "Supernet",
    "TeacherPool",
    "grow_base",
    "load_pool",
    "train_pool",
]
