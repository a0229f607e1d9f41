"""Rewrites of any module along its topology: what is kept of every channel group, applied to all tensors at once."""

from jdkd.rewrite.blocks import arrange
from jdkd.rewrite.channels import mask, prune, widen
from jdkd.rewrite.verify import verify

__all__ = ["arrange", "mask", "prune", "verify", "widen"]
