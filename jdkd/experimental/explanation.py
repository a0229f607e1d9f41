"""Which kernel a forward of an elastic layer takes, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from jdkd._verdicts import dtype_name
from jdkd.errors import InputError
from jdkd.experimental.conv_bn_act import ElasticConvBNAct
from jdkd.experimental.levels import ElasticLevelsConv2d, Levels, listed
from jdkd.nn.elastic_conv import ElasticConv2d
from jdkd.nn.elastic_linear import ElasticLinear
from jdkd.nn.unwrapping import unwrapped
from jdkd.ops import elastic_kernels, elastic_levels_kernels
from jdkd.ops.elastic_conv import check_channels
from jdkd.ops.elastic_kernels import ConvCall, dtype_of


class Explanation(NamedTuple):
    """The kernel of one forward; printed, a line for the call and one for every kernel.

    Args:
        call: the layer and what the choice depended on.
        kernel: name of the one that is taken.
        why: what speaks for it.
        others: the kernels that are not taken, with the reason each.
    """

    call: str
    kernel: str
    why: str
    others: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return "\n".join(
            [self.call, f"{self.kernel}: {self.why}", *(f"not {name}: {why}" for name, why in self.others)]
        )


def explain(layer: nn.Module, x: Levels) -> Explanation:
    """Says which kernel the next forward of an elastic layer takes, and why; nothing is computed.

    There is no device synchronisation.

    The tables are those of :mod:`jdkd.ops.elastic_kernels`, and for levels of a pyramid of
    :mod:`jdkd.ops.elastic_levels_kernels`.

    Args:
        layer: :class:`ElasticConv2d`, :class:`ElasticConvBNAct`, :class:`ElasticLevelsConv2d` or
            :class:`ElasticLinear`.
        x: the layer's input, active channels only; its values are not looked at, and a tensor on the meta device will
            do for the shape. For levels as their layer takes them.

    Returns:
        The kernel, the reason, and the reasons against the others.

    Raises:
        InputError: if ``layer`` is another module; and as the forward, if ``x`` or the backend asked for does not fit.
    """
    layer = unwrapped(layer)
    for kind, words in _WORDS.items():
        if isinstance(layer, kind):
            return words(layer, x)
    raise InputError(
        f"explain has no kernels for {type(layer).__name__}; give {', '.join(kind.__name__ for kind in _WORDS)}"
    )


def _of_convolution(conv: ElasticConv2d, x: Tensor) -> Explanation:
    active = conv._now()
    check_channels(x, active.inputs.count, dim=-3, where=type(conv).__name__)
    call = conv._call(x, active)
    if conv._is_transformed(active):
        why = "the kernel transform makes new filters at every forward, and ATen convolves with them"
        return _explanation(conv, call)._replace(kernel="aten", why=why, others=())
    return _explanation(conv, call)


def _of_levels(conv: ElasticLevelsConv2d, x: Levels) -> Explanation:
    active, xs = conv._now(), listed(x)
    kernel, why, others = elastic_levels_kernels.explain(
        xs, conv.weight.device, active.inputs.count, conv.active_kernel_size, active.padding, conv.activation
    )
    calls = [conv._call(x, active) for x in xs]
    product = calls[0].product._replace(positions=sum(call.product.positions for call in calls))
    call = calls[0]._replace(product=product, is_channels_last=all(call.is_channels_last for call in calls))
    note = "; the kernel transform makes new filters at every forward" if conv._is_transformed(active) else ""
    count = "1 level" if len(xs) == 1 else f"{len(xs)} levels"
    return Explanation(f"{type(conv).__name__}: {count}, {call}", kernel, why + note, others)


def _of_unit(unit: ElasticConvBNAct, x: Tensor) -> Explanation:
    route = "parts"
    if not unit._normalises_by_batch():
        active, _ = unit._active(x)
        route = unit._route(x, active)
    if route == "parts":
        found = _of_convolution(unit.conv, x)
        return found._replace(why=f"{found.why}; normalisation, residual and ReLU run by themselves")
    call = unit.conv._call(x, active)
    if route == "one pass":
        return _explanation(unit, call, "normalisation, residual and ReLU too")
    return _explanation(unit, call._replace(is_listed=False), "the filters take the scale of the normalisation")


def _of_linear(linear: ElasticLinear, x: Tensor) -> Explanation:
    inputs, outputs = linear._now()
    check_channels(x, inputs.count, dim=-1, where=type(linear).__name__)
    dtype = dtype_name(dtype_of(x))
    call = f"{type(linear).__name__}: {inputs.count}->{outputs.count} features, {dtype}, on {x.device}"
    return Explanation(
        call, "aten", "one matrix product with the active part of the weight; it has no other kernel", ()
    )


def _explanation(layer: nn.Module, call: ConvCall, note: str = "") -> Explanation:
    kernel, why, others = elastic_kernels.explain(call)
    return Explanation(f"{type(layer).__name__}: {call}", kernel, f"{why}; {note}" if note else why, others)


_WORDS: dict[type, Callable[..., Explanation]] = {
    ElasticConvBNAct: _of_unit,
    ElasticLevelsConv2d: _of_levels,
    ElasticConv2d: _of_convolution,
    ElasticLinear: _of_linear,
}
