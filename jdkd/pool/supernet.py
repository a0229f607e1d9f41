"""One set of weights, many teachers."""

import torch
from torch import nn

from jdkd.detect import read
from jdkd.errors import InputError
from jdkd.graph import Topology
from jdkd.nn import Subnet as Active
from jdkd.nn import set_subnet
from jdkd.pool.space import Space, Subnet
from jdkd.pool.stages import pool_groups, read_stages
from jdkd.rewrite import Rewrite, elastic_groups, make_elastic, make_plain
from jdkd.rewrite.channels import duplicate, tensors_by_name


class Supernet:
    """The largest network of a space, whose subnets run in place over its shared weights.

    Args:
        space: which subnets there are.
        largest: a plain detector, which becomes the supernet, in place.
        topology: of ``largest``; read off it if left out.

    Raises:
        InputError: the detector is not the largest of the space.
    """

    def __init__(self, space: Space, largest: nn.Module, topology: Topology | None = None):
        self.space = space
        self.topology = topology if topology is not None else read(largest)
        groups = pool_groups(self.topology)
        elastic = elastic_groups(largest, self.topology, groups)
        self.left_out = dict(elastic.left_out)
        self.stages = read_stages(self.topology, elastic.groups)
        depths = [stage.depth for stage in self.stages]
        if depths != [choices[-1] for choices in space.depths]:
            raise InputError(
                f"the largest network of the space has {[choices[-1] for choices in space.depths]} blocks in its "
                f"stages and this detector {depths}; give the space that it was grown to."
            )
        self.model = make_elastic(largest, self.topology, groups)
        self.active = space.largest

    def activate(self, subnet: Subnet) -> None:
        """From now on a forward of ``model`` runs this subnet; nothing is copied.

        Raises:
            InputError: the supernet does not hold it.
        """
        self.space.check(subnet)
        set_subnet(self.model, Active(self.units(subnet), depths=self._depths(subnet)))
        self.active = subnet

    def units(self, subnet: Subnet) -> dict[str, int]:
        """How many leading units of each elastic channel group a subnet runs."""
        return {
            group.name: min(group.units, group.rounded(width * group.units))
            for stage, width in zip(self.stages, subnet.widths, strict=True)
            for group in stage.groups
        }

    def _depths(self, subnet: Subnet) -> dict[str, int]:
        stages = zip(self.stages, subnet.depths, strict=True)
        return {stage.blocks.name: depth for stage, depth in stages if stage.blocks is not None}

    def extract(self, subnet: Subnet) -> nn.Module:
        """The subnet as a plain detector with weights of its own.

        Its normalisation statistics are the supernet's: recalibrate them before it is used or scored.

        Raises:
            InputError: the supernet does not hold it.
        """
        self.space.check(subnet)
        keep = {name: range(units) for name, units in self.units(subnet).items() if units < self.topology[name].units}
        blocks = {name: range(depth) for name, depth in self._depths(subnet).items()}
        return Rewrite(keep=keep, blocks=blocks).apply(make_plain(duplicate(self.model)), self.topology)

    @torch.no_grad()
    def sort_channels(self) -> None:
        """Puts the units of every elastic group in order of importance, so that leading ones are the best.

        Importance is the L1 norm of the weights that read a unit (Cai et al., ICLR 2020). The function of the largest
        network does not change.
        """
        tensors = tensors_by_name(self.model)
        for group in (group for stage in self.stages for group in stage.groups):
            strength = torch.zeros(group.units, dtype=torch.float64)
            for slot in group.slots:
                if slot.role == "in":
                    each = tensors[slot.tensor].abs().movedim(slot.dim, 0).flatten(1).sum(1)  # [units * repeat]
                    strength += each.double().cpu().reshape(slot.places.shape).sum(1)
            order = strength.argsort(descending=True, stable=True)
            for slot in group.slots:
                tensor = tensors[slot.tensor]
                places = torch.from_numpy(slot.places)[order].flatten().to(tensor.device)
                tensor.copy_(tensor.index_select(slot.dim, places))


def grow_base(base: nn.Module, topology: Topology, space: Space) -> tuple[nn.Module, Topology]:
    """The largest network of ``space``, made from the base without a change of its function.

    What a teacher can teach depends on a shared feature basis, so a pool grows out of the base instead of being trained
    beside it. Channels that the model's code holds on to, and lists whose blocks cannot be born as the identity, stay
    as they are.

    Args:
        base: any detector.
        topology: of the base, verified.
        space: what to grow to, drawn around the base.

    Returns:
        The largest network, whose outputs equal the base's, and its topology.
    """
    groups = [topology[name] for name in elastic_groups(base, topology, pool_groups(topology)).groups]
    more = {g.name: g.rounded(space.growth * g.units) - g.units for g in groups if g.grows}
    extra = {name: count for name, count in more.items() if count > 0}
    blocks = {}
    for listed, choices in zip(topology.block_lists, space.depths, strict=False):
        here = range(len(listed.blocks))
        blocks[listed.name] = (*here, *[listed.copied] * (choices[-1] - len(here)))
    largest = Rewrite(extra=extra, blocks=blocks).apply(base, topology)
    return largest, read(largest, like=topology)
