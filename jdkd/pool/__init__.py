"""The elastic teacher pool: its space, its supernet, its training."""

from jdkd.pool.elastic_pool import Member, TeacherPool, load_pool, train_pool
from jdkd.pool.shrinking import PHASES, Phase, Recipe
from jdkd.pool.space import Space, Subnet
from jdkd.pool.supernet import Supernet, grow

__all__ = [
    "PHASES",
    "Member",
    "Phase",
    "Recipe",
    "Space",
    "Subnet",
    "Supernet",
    "TeacherPool",
    "grow",
    "load_pool",
    "train_pool",
]
