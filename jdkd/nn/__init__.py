"""Drop-in modules, and the switch for the elastic ones of a whole model; what they compute is in
:mod:`jdkd.functional`.
"""

from jdkd.nn.candidates import Candidate, score_candidates
from jdkd.nn.compilation import compile_elastic
from jdkd.nn.conv_bn_act import ConvBNAct, ElasticConvBNAct
from jdkd.nn.coupling import ChannelSlot, ElasticGroups
from jdkd.nn.elastic_batch_norm import ElasticBatchNorm2d
from jdkd.nn.elastic_block import ElasticBlock
from jdkd.nn.elastic_conv import ElasticConv2d
from jdkd.nn.elastic_linear import ElasticLinear
from jdkd.nn.elastic_norm import ElasticFrozenBatchNorm2d, ElasticGroupNorm, ElasticLayerNorm
from jdkd.nn.exchange import as_elastic, as_elastic_block, as_plain
from jdkd.nn.explanation import Explanation, explain
from jdkd.nn.levels import ElasticLevelsConv2d, LevelsConv2d
from jdkd.nn.masked import masked
from jdkd.nn.packing import pack_forwards, packed
from jdkd.nn.pearson import DISTLoss, PearsonTap, PKDLoss
from jdkd.nn.recomputation import checkpoint
from jdkd.nn.subnet import Subnet
from jdkd.nn.switching import export, set_subnet

__all__ = [
    "Candidate",
    "ChannelSlot",
    "ConvBNAct",
    "DISTLoss",
    "ElasticBatchNorm2d",
    "ElasticBlock",
    "ElasticConv2d",
    "ElasticConvBNAct",
    "ElasticFrozenBatchNorm2d",
    "ElasticGroupNorm",
    "ElasticGroups",
    "ElasticLayerNorm",
    "ElasticLevelsConv2d",
    "ElasticLinear",
    "Explanation",
    "LevelsConv2d",
    "PKDLoss",
    "PearsonTap",
    "Subnet",
    "as_elastic",
    "as_elastic_block",
    "as_plain",
    "checkpoint",
    "compile_elastic",
    "explain",
    "export",
    "masked",
    "pack_forwards",
    "packed",
    "score_candidates",
    "set_subnet",
]
