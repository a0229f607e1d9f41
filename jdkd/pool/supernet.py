"""One set of weights, many teachers."""

from torch import nn

from jdkd.detect import NEW, build, channel_groups, inherit
from jdkd.detect.contract import own_detector
from jdkd.detect.groups import inner_group
from jdkd.detect.resnet import STAGES, Layers
from jdkd.nn import ElasticBatchNorm2d, ElasticConv2d, ElasticGroups, ElasticStage, set_subnet
from jdkd.nn import Subnet as Active
from jdkd.pool.space import Space, Subnet

ELASTIC = Layers(ElasticConv2d, ElasticBatchNorm2d, ElasticStage)


class Supernet:
    """The largest network of a space, whose subnets run in place over its shared weights.

    Args:
        space: which subnets there are.
        largest: a plain detector of ``space.largest`` whose weights are taken over.
    """

    def __init__(self, space: Space, largest: nn.Module):
        self.space = space
        self.model = build(space.largest, ELASTIC)
        self.model.load_state_dict(largest.state_dict())
        self.model.to(next(largest.parameters()).device)
        inner = {name: group for name, group in channel_groups(space.largest).items() if ".inner" in name}
        stages = {name: f"backbone.body.{name}" for name in STAGES}
        self.model.elastic_groups = ElasticGroups.from_tensors(inner, stages)
        self.active = space.everything

    def activate(self, subnet: Subnet) -> None:
        """From now on a forward of ``model`` runs this subnet; nothing is copied.

        Raises:
            InputError: the supernet does not hold it.
        """
        self.space.check(subnet)
        channels = {
            inner_group(number, block, k): width
            for number in range(len(STAGES))
            for block, widths in enumerate(self.space.inner_widths(subnet, number))
            for k, width in enumerate(widths)
        }
        set_subnet(self.model, Active(channels, depths=dict(zip(STAGES, subnet.depths, strict=True))))
        self.active = subnet

    def extract(self, subnet: Subnet) -> nn.Module:
        """The subnet as a plain detector with weights of its own, in training mode.

        Its normalisation statistics are the supernet's: recalibrate them before it is used or scored.
        """
        spec = self.space.spec(subnet)
        channels = {
            inner_group(number, block, k): range(width)
            for number in range(len(STAGES))
            for block, widths in enumerate(self.space.inner_widths(subnet, number))
            for k, width in enumerate(widths)
        }
        return inherit(self.model, spec, channels=channels, blocks=[range(depth) for depth in subnet.depths])

    def sort_channels(self) -> None:
        """Puts the inner channels of every block in order of importance, so that leading ones are the best.

        Importance is the L1 norm of the weights that read a channel (Cai et al., ICLR 2020). The function of
        the largest network does not change.
        """
        self.activate(self.space.everything)
        state = self.model.state_dict()
        order = {}
        for name, group in channel_groups(self.space.largest).items():
            if ".inner" in name:
                ((reader, dim, _),) = group.consumers
                strength = state[reader].abs().movedim(dim, 0).flatten(1).sum(1)
                order[name] = strength.argsort(descending=True, stable=True).tolist()
        self.model.load_state_dict(inherit(self.model, self.space.largest, channels=order).state_dict())


def grow(base: nn.Module, space: Space) -> nn.Module:
    """The largest network of ``space``, born from the base without a change of its function.

    What a teacher can teach depends on a shared feature basis, so a pool grows out of the base instead of
    being trained beside it.

    Args:
        base: a detector of the architecture that ``space`` was drawn around.
        space: what to grow to.

    Returns:
        The largest network, in training mode; its outputs equal the base's.

    Raises:
        InputError: the base was not built from a spec.
    """
    base = own_detector(base, "grow")
    before, blocks, channels = channel_groups(base.spec), [], {}
    for number, stage in enumerate(space.largest.stages):
        depth = base.spec.stages[number].depth
        blocks.append((*range(depth), *[NEW] * (stage.depth - depth)))
        for block, widths in enumerate(stage.blocks[:depth]):
            for k, width in enumerate(widths):
                name = inner_group(number, block, k)
                channels[name] = (*range(before[name].size), *[NEW] * (width - before[name].size))
    return inherit(base, space.largest, channels=channels, blocks=blocks)
