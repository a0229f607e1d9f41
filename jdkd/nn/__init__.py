"""Drop-in modules, and the switch for the elastic ones of a whole model; what they compute is in
:mod:`jdkd.functional`.
"""

from jdkd.nn.compilation import compile_elastic
from jdkd.nn.conv_bn_act import ConvBNAct, ElasticConvBNAct
from jdkd.nn.coupling import ElasticGroups, Side, Stage
from jdkd.nn.elastic_batch_norm import ElasticBatchNorm2d
from jdkd.nn.elastic_conv import ElasticConv2d
from jdkd.nn.elastic_linear import ElasticLinear
from jdkd.nn.masked import masked
from jdkd.nn.pearson import DISTLoss, PearsonTap, PKDLoss
from jdkd.nn.recomputation import checkpoint
from jdkd.nn.stage import ElasticStage
from jdkd.nn.subnet import Subnet, export, set_subnet

__all__ = [
    "ConvBNAct",
    "DISTLoss",
    "ElasticBatchNorm2d",
    "ElasticConv2d",
    "ElasticConvBNAct",
    "ElasticGroups",
    "ElasticLinear",
    "ElasticStage",
    "PKDLoss",
    "PearsonTap",
    "Side",
    "Stage",
    "Subnet",
    "checkpoint",
    "compile_elastic",
    "export",
    "masked",
    "set_subnet",
]
