"""The operators as functions."""

from jdkd.ops.elastic_conv import elastic_conv2d

__all__ = ["elastic_conv2d"]
