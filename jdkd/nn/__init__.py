"""Drop-in modules, and the switch for the elastic ones of a whole model; what they compute is in
:mod:`jdkd.functional`.
"""

from jdkd.nn.coupling import ChannelSlot, ElasticGroups
from jdkd.nn.elastic_batch_norm import ElasticBatchNorm2d
from jdkd.nn.elastic_block import ElasticBlock
from jdkd.nn.elastic_conv import ElasticConv2d
from jdkd.nn.elastic_linear import ElasticLinear
from jdkd.nn.elastic_norm import ElasticFrozenBatchNorm2d, ElasticGroupNorm
from jdkd.nn.exchange import as_elastic, as_elastic_block, as_plain
from jdkd.nn.pearson import DISTLoss, PearsonTap, PKDLoss
from jdkd.nn.recomputation import checkpoint
from jdkd.nn.subnet import Subnet
from jdkd.nn.switching import export, set_subnet

__all__ = [
    "ChannelSlot",
    "DISTLoss",
    "ElasticBatchNorm2d",
    "ElasticBlock",
    "ElasticConv2d",
    "ElasticFrozenBatchNorm2d",
    "ElasticGroupNorm",
    "ElasticGroups",
    "ElasticLinear",
    "PKDLoss",
    "PearsonTap",
    "Subnet",
    "as_elastic",
    "as_elastic_block",
    "as_plain",
    "checkpoint",
    "export",
    "set_subnet",
]
