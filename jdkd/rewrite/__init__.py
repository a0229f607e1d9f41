"""Rewrites of any module along its topology, and what a module is made of, as data that builds it again."""

from jdkd.rewrite.architecture import Architecture
from jdkd.rewrite.blocks import arrange
from jdkd.rewrite.building import build
from jdkd.rewrite.channels import mask, prune, widen
from jdkd.rewrite.checkpoint import load_architecture, save_architecture
from jdkd.rewrite.description import describe
from jdkd.rewrite.elastic import elastic_groups, make_elastic, make_plain
from jdkd.rewrite.rewriting import Rewrite
from jdkd.rewrite.verify import verify

__all__ = [
    "Architecture",
    "Rewrite",
    "arrange",
    "build",
    "describe",
    "elastic_groups",
    "load_architecture",
    "make_elastic",
    "make_plain",
    "mask",
    "prune",
    "save_architecture",
    "verify",
    "widen",
]
