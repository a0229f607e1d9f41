"""Drop-in modules, and the switch for the elastic ones of a whole model; what they compute is in
:mod:`jdkd.functional`.
"""

from jdkd.nn.coupling import ChannelSlot, ElasticGroups
from jdkd.nn.elastic_batch_norm import ElasticBatchNorm2d
from jdkd.nn.elastic_conv import ElasticConv2d
from jdkd.nn.elastic_linear import ElasticLinear
from jdkd.nn.pearson import DISTLoss, PearsonTap, PKDLoss
from jdkd.nn.recomputation import checkpoint
from jdkd.nn.stage import ElasticStage
from jdkd.nn.subnet import Subnet
from jdkd.nn.switching import export, set_subnet

__all__ = [
    "ChannelSlot",
    "DISTLoss",
    "ElasticBatchNorm2d",
    "ElasticConv2d",
    "ElasticGroups",
    "ElasticLinear",
    "ElasticStage",
    "PKDLoss",
    "PearsonTap",
    "Subnet",
    "checkpoint",
    "export",
    "set_subnet",
]
