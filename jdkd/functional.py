"""The operators as functions."""

from jdkd.ops.elastic_conv import elastic_conv2d
from jdkd.ops.elastic_levels import elastic_conv2d_levels
from jdkd.ops.pearson_loss import dist_loss, pearson_tap, pkd_loss

__all__ = ["dist_loss", "elastic_conv2d", "elastic_conv2d_levels", "pearson_tap", "pkd_loss"]
