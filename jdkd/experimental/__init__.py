"""What works and is tested, and that nothing in the product calls yet. No other package imports from here.

Each would come back to :mod:`jdkd.nn` on one condition:

- :func:`pack_forwards`, :func:`packed`: the pool's training is measurably faster with packed weights on the device
  where pools are trained; on two CPU cores a whole step gained 8 %.
- :func:`compile_elastic`: the pool trains under ``torch.compile``, which pays on a GPU alone, and none was measured.
- :func:`masked`, :func:`score_candidates`: the search screens so many pruned candidates of one parent that cutting each
  with :mod:`jdkd.rewrite` shows in its time.
- :class:`ElasticConvBNAct`, :class:`ConvBNAct`: the kernel of 1x1 convolutions measures fastest on some GPU; without it
  folding a normalisation at every forward is for exported models, where :mod:`jdkd.latency` does it once.
- :class:`ElasticLevelsConv2d`, :class:`LevelsConv2d`: the one launch for all levels of a pyramid measures faster on a
  GPU than a launch a level, and a supernet has an elastic head.
- :func:`explain`: an elastic convolution has more than one kernel that runs unasked.
"""

from jdkd.experimental.candidates import PrunedCandidate, score_candidates
from jdkd.experimental.compilation import compile_elastic
from jdkd.experimental.conv_bn_act import ConvBNAct, ElasticConvBNAct
from jdkd.experimental.explanation import Explanation, explain
from jdkd.experimental.levels import ElasticLevelsConv2d, LevelsConv2d
from jdkd.experimental.masked import masked
from jdkd.experimental.packing import pack_forwards, packed

__all__ = [
    "ConvBNAct",
    "ElasticConvBNAct",
    "ElasticLevelsConv2d",
    "Explanation",
    "LevelsConv2d",
    "PrunedCandidate",
    "compile_elastic",
    "explain",
    "masked",
    "pack_forwards",
    "packed",
    "score_candidates",
]
