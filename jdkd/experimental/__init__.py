"""What works and is tested, and that nothing in the product calls yet. No other package imports from here.

Each would come back to :mod:`jdkd.nn` on one condition:

- :func:`pack_forwards`, :func:`packed`: a step of a supernet is measurably faster with packed weights than with the
  layers as they are, on a device where pools are trained. On two CPU cores it took 1.00 s against 1.02 s, and 0.98 s
  with gradients in ``main_grad``, which no optimizer here reads; the quartiles of all three overlap. No GPU was timed.
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
