"""The operators as functions."""

from jdkd.ops.elastic_conv import elastic_conv2d
from jdkd.ops.pearson_loss import dist_loss, pearson_tap, pkd_loss

__all__ = ["dist_loss", "elastic_conv2d", "pearson_tap", "pkd_loss"]
