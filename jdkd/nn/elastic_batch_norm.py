"""The elastic batch normalisation: torch's own, of which a forward uses only what is active."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.nn.elastic import Elastic, filled, part_of
from jdkd.nn.subnet import Subnet
from jdkd.nn.symbolic import Proxy, as_node
from jdkd.ops.active_channels import Channels, ChannelsLike, active_channels, on_device
from jdkd.ops.elastic_conv import check_channels

STATISTICS = ("shared", "own")


class _Norm(NamedTuple):
    """The active part of a batch normalisation."""

    channels: Channels
    name: str | None  # of the running statistics; None: the layer's own buffers


class _Statistics(nn.Module):
    """Running statistics of one subnet, ``[C_max]``, of which the active channels count."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, of: nn.BatchNorm2d):
        super().__init__()
        with torch.inference_mode(False):  # where buffers would be made that training cannot update
            for name, buffer in of._buffers.items():
                self.register_buffer(name, None if buffer is None else buffer.detach().clone())

    def reset_parameters(self) -> None:  # under this name, as FSDP asks every module that holds tensors
        for name, buffer in self._buffers.items():
            if buffer is not None:
                buffer.fill_(name == "running_var")


class ElasticBatchNorm2d(Elastic, nn.BatchNorm2d):
    """Batch normalisation of the active channels; built as ``nn.BatchNorm2d``, with its state dict.

    Training updates the running statistics of the active channels in place and leaves the others alone. Another width
    upstream means other activations: recalibrate (``jdkd.train.calibrate_bn``) before a subnet is scored or exported.
    ``momentum=None`` averages over every batch that the statistics saw, whichever subnet was active.
    ``active_channels`` says how many are active now.

    Sets of own statistics are there from the start, in the order of their names, so that copies of a model, the ranks
    of ``DistributedDataParallel`` and state dicts line up. They are in the state dict under ``own``. That of a plain
    layer, which has none, loads too: every set becomes a copy of its statistics.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as for ``nn.BatchNorm2d``.
        statistics: ``"shared"``: one set for all subnets. ``"own"``: one for every subnet of ``subnets`` (Yu et al.,
            Slimmable Neural Networks, ICLR 2019, section 3.2), ``[C_max]`` each, which :func:`set_subnet` makes the
            active one; the layer's shared set is for what :meth:`set_active` gives no name. Under
            :func:`compile_elastic` every subnet compiles once then, since a graph knows its statistics by name.
        subnets: that have own statistics, as :class:`Subnet` or, for :meth:`set_active`, by a name; no others can be
            set later.

    Raises:
        InputError: if statistics are to be kept of no subnet, or subnets are given that share theirs.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        statistics: str = "shared",
        subnets: Iterable[Subnet | str] = (),
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if statistics not in STATISTICS:
            raise InputError(f"statistics={statistics!r}; choose one of {', '.join(STATISTICS)}")
        names = _names(subnets)
        if statistics == "own":
            if self.running_mean is None:
                raise InputError(
                    "statistics='own' and track_running_stats=False leave nothing to keep; choose 'shared'"
                )
            if not names:
                raise InputError(
                    "statistics='own' and no subnets to keep them of; list all that will be set, as in "
                    "subnets=[Subnet({'stream': 8}), ...], or choose 'shared'"
                )
            self.own = nn.ModuleDict({name: _Statistics(self) for name in names})
        elif names:
            raise InputError(f"subnets names {len(names)} and statistics={statistics!r} keeps one set; choose 'own'")
        self.set_active()

    def set_active(self, channels: ChannelsLike = None, name: str | None = None) -> None:
        """Chooses the channels that the next forwards normalise; no device synchronisation.

        Args:
            channels: None (all), the number of leading channels, or distinct indices in the order of the
                input.
            name: of one of ``subnets``, whose own statistics are used; None: the shared ones.

        Raises:
            InputError: if the supernet has no such channels; the active ones stay as they were.
        """
        self._activate(channels, name)

    def part(self, channels: ChannelsLike = None, name: str | None = None) -> _Norm:
        """Reads what :meth:`set_active` is given, and activates nothing."""
        if name is not None and not self.has_own_statistics:
            raise InputError(
                f"name={name!r} but all subnets share the statistics; build the layer with statistics='own'"
            )
        if name is not None and name not in self.own:
            shown = [*self.own][:4] + ["..."] * (len(self.own) > 4)
            raise InputError(
                f"name={name!r} is none of the {len(self.own)} subnets that have statistics ({', '.join(shown)}); list "
                "every subnet where the layer is built, ElasticBatchNorm2d(..., statistics='own', subnets=[...])"
            )
        return _Norm(active_channels(channels, self.num_features, "channels"), name)

    @property
    def active_channels(self) -> int:
        return self._record.active.channels.count

    @property
    def has_own_statistics(self) -> bool:
        """Whether every subnet has running statistics of its own."""
        return "own" in self._modules

    @property
    def active_statistics(self) -> ElasticBatchNorm2d | _Statistics:
        """What holds the running statistics in use: ``running_mean`` and ``running_var``, ``[C_max]``, and
        ``num_batches_tracked``."""
        return self._statistics(self._record.active.name)

    def _statistics(self, name: str | None) -> ElasticBatchNorm2d | _Statistics:
        holder: Any = self if name is None else self.own[name]
        return holder

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if self.track_running_stats and self.has_own_statistics:
            for statistics in self.own.values():
                cast(_Statistics, statistics).reset_parameters()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.has_own_statistics and not any(key.startswith(f"{prefix}own.") for key in state_dict):
            for buffer in self._buffers:  # of a plain layer; children are loaded next, from this dict
                for name in self.own if f"{prefix}{buffer}" in state_dict else ():
                    state_dict[f"{prefix}own.{name}.{buffer}"] = state_dict[f"{prefix}{buffer}"].clone()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return as_node(self, x, x)
        self._check_input_dim(x)
        active, name = self._now()
        check_channels(x, active.count, dim=1, where=type(self).__name__)
        in_transform = torch._C._are_functorch_transforms_active()
        if name is None and active.index is None and active.count == self.num_features and not in_transform:
            return super().forward(x)
        weight, bias = part_of(self.weight, active), part_of(self.bias, active)  # [C]
        own = self._statistics(name)
        means, variances, seen = own.running_mean, own.running_var, own.num_batches_tracked  # [C_max], [C_max], []
        if means is None or variances is None or (self.training and not self.track_running_stats):
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        mean, variance = part_of(means, active), part_of(variances, active)  # [C]
        if not self.training:
            return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, self.eps)
        if seen is not None:
            seen.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 0.0 if seen is None else 1.0 / float(seen)
        if in_transform:  # vmap loses what batch_norm writes into a view of a batch
            mean, variance = (part.clone(memory_format=torch.contiguous_format) for part in (mean, variance))
        y = F.batch_norm(x, mean, variance, weight, bias, True, momentum, self.eps)
        if in_transform or active.index is not None:
            index = on_device(active.index, mean.device)
            for whole, part in ((means, mean), (variances, variance)):
                if in_transform or index is None:
                    whole[slice(active.count) if index is None else index] = part
                else:  # past the version counter, as batch_norm writes: another subnet in the graph may hold a view
                    whole.data.index_copy_(0, index, part)
        return y

    def export(self) -> nn.BatchNorm2d:
        """Returns: a plain batch normalisation with a copy of the active channels, equal in output."""
        active = self._record.active.channels
        plain = nn.BatchNorm2d(
            active.count, self.eps, self.momentum, self.affine, self.track_running_stats, device="meta"
        )
        own = self.active_statistics
        homes = {"weight": self, "bias": self, "running_mean": own, "running_var": own}
        parts = {name: part_of(getattr(home, name), active) for name, home in homes.items()}
        return filled(plain, self, **parts, num_batches_tracked=own.num_batches_tracked)

    def extra_repr(self) -> str:
        own = ", statistics='own'" if self.has_own_statistics else ""
        return f"active={self.active_channels}/{self.num_features}, {super().extra_repr()}{own}"


def _names(subnets: Iterable[Subnet | str]) -> list[str]:
    """Names of sets of statistics, in an order that does not depend on the one given."""
    if isinstance(subnets, Subnet | str) or not isinstance(subnets, Iterable):
        raise InputError(f"subnets={subnets!r} is no list of subnets; give [Subnet(...), ...]")
    names = set()
    for subnet in subnets:
        name = subnet.id if isinstance(subnet, Subnet) else subnet
        if not isinstance(name, str) or not name.isidentifier():
            raise InputError(f"subnets holds {name!r}; give Subnets, or names of letters, digits and underscores")
        if hasattr(nn.ModuleDict(), name):
            raise InputError(f"subnets holds {name!r}, an attribute of every module; give the statistics another name")
        names.add(name)
    return sorted(names)
