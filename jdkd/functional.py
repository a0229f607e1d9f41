"""The operators as functions."""

from jdkd.ops.elastic_conv import elastic_conv2d
from jdkd.ops.elastic_levels import elastic_conv2d_levels
from jdkd.ops.elastic_pointwise import elastic_pointwise_conv2d, elastic_pointwise_conv2d_stats
from jdkd.ops.pearson_loss import dist_loss, pearson_tap, pkd_loss

__all__ = [
    "dist_loss",
    "elastic_conv2d",
    "elastic_conv2d_levels",
    "elastic_pointwise_conv2d",
    "elastic_pointwise_conv2d_stats",
    "pearson_tap",
    "pkd_loss",
]
