"""Drop-in modules: state and representation only; what they compute is in :mod:`jdkd.functional`."""

from jdkd.nn.elastic import ElasticBatchNorm2d, ElasticConv2d, ElasticLinear
from jdkd.nn.pearson import DISTLoss, PearsonTap, PKDLoss

__all__ = ["DISTLoss", "ElasticBatchNorm2d", "ElasticConv2d", "ElasticLinear", "PKDLoss", "PearsonTap"]
