"""Drop-in modules: state and representation only; what they compute is in :mod:`jdkd.functional`."""

from jdkd.nn.elastic import ElasticBatchNorm2d, ElasticConv2d, ElasticLinear
from jdkd.nn.pearson import PKDLoss

__all__ = ["ElasticBatchNorm2d", "ElasticConv2d", "ElasticLinear", "PKDLoss"]
