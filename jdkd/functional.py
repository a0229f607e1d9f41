"""The operators as functions."""

from jdkd.ops.elastic_conv import elastic_conv2d
from jdkd.ops.pearson import pkd_loss

__all__ = ["elastic_conv2d", "pkd_loss"]
