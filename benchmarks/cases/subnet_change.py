"""What a change of subnet costs the host: waits for the device, kernels and graphs that are compiled anew.

The network is the backbone and the pyramid of R18-FPN in evaluation, its weights float32; in bfloat16 it runs under
autocast. The first call of ours runs the whole supernet, then a subnet of listed channels, so that all kinds of kernels
are there, and then :data:`CHANGES` subnets of random widths and depths, of leading and of listed channels in turn. Of
these its row counts ``host_syncs`` and ``kernels_compiled``, by Triton; ``graphs_compiled`` counts from the whole
supernet on.

What is timed is a forward of one subnet, whose weights a cache may hold; the host's time has the switch to it too.
``slice_contiguous`` is the supernet as once-for-all writes it, ``jdkd torch.compile`` the elastic one compiled by
``compile_elastic``, ``jdkd triton`` with the kernels wherever they fit. ``least_bytes`` counts every weight once.
"""

from __future__ import annotations

import contextlib
import functools
import random
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.cases.supernet_step import (
    NAMES,
    R18,
    SMALL,
    TOLERANCES,
    Inputs,
    Net,
    Network,
    elastic,
    packed,
    sliced,
    topology_of,
    weights_of,
)  # fmt: skip
from benchmarks.graphs import Graphs
from benchmarks.harness import Case
from jdkd._backend import use_backend
from jdkd.experimental import compile_elastic
from jdkd.nn import Subnet, set_subnet

NAME = "subnet_change"
CHANGES = 20
SHARES = (0.25, 0.5, 0.75, 1.0)
TIMED = 2  # of supernet_step.SUBNETS


def cases(device: str, full: bool = False) -> Iterator[Case]:
    """The case for a device; on a CPU, where nothing waits and no kernel is compiled, if ``full``."""
    if device == "cuda" or full:
        yield case(R18, SMALL, torch.bfloat16 if device == "cuda" else torch.float32, device)


def case(
    backbone: str, size: tuple[int, int], dtype: torch.dtype, device: str, images: int = 2, width: float = 1.0
) -> Case:
    """One network.

    Args:
        backbone, size, dtype, device, images, width: as of :func:`benchmarks.cases.supernet_step.case`.
    """
    network, graphs = Network(backbone, width), Graphs()

    @functools.cache  # compiled once, however many sets of inputs are drawn
    def nets() -> dict[str, Net]:
        found = {"slice_contiguous": sliced(network, device), "jdkd": elastic(network, device)}
        found["jdkd packed"] = packed(network, device, "autograd")
        found["jdkd torch.compile"] = elastic(network, device)
        compile_elastic(found["jdkd torch.compile"].model, backend=graphs)
        if device == "cuda":
            found["jdkd triton"] = elastic(network, device)
        state = found["jdkd"].model.state_dict()
        for net in found.values():
            net.model.load_state_dict(state)
            net.model.eval()
        return found

    def make() -> Inputs:
        batch = torch.randn(images, 3, *size, device=device).contiguous(memory_format=torch.channels_last)
        return Inputs(batch, nets())

    names = ["slice_contiguous", "jdkd", "jdkd packed", "jdkd torch.compile", *["jdkd triton"] * (device == "cuda")]
    return Case(
        NAME,
        f"{NAMES[backbone]} {size[0]}x{size[1]} N={images}",
        "evaluation",
        dtype,
        "channels-last",
        make,
        lambda given: Provided("slice_contiguous", network, torch.float32, graphs)(given),
        {name: Provided(name, network, dtype, graphs) for name in names},
        4 * weights_of(network),
        tolerance=TOLERANCES[dtype],
    )


class Provided:
    """A forward of one subnet by a provider's own net, whose first call counts what changes cost: ``counts``."""

    def __init__(self, name: str, network: Network, dtype: torch.dtype, graphs: Graphs) -> None:
        self.name, self.network, self.dtype, self.graphs = name, network, dtype, graphs
        self.counts: dict[str, int] | None = None

    def __call__(self, given: Inputs) -> list[Tensor]:
        net = given.nets[self.name]
        if self.counts is None and self.name != "slice_contiguous":
            self.counts = self.counted(net, given.images)
        net.activate(TIMED)
        return self.run(net, given.images)

    def run(self, net: Net, images: Tensor) -> list[Tensor]:
        autocast = torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32)
        backend = use_backend("triton") if self.name == "jdkd triton" else contextlib.nullcontext()
        with torch.no_grad(), autocast, backend:
            return net.model(images)

    def counted(self, net: Net, images: Tensor) -> dict[str, int]:
        """What :data:`CHANGES` changes of subnet cost."""
        whole, listed, *others = subnets(self.network)
        set_subnet(net.model, whole)
        self.run(net, images)
        graphs = self.graphs.count
        set_subnet(net.model, listed)
        self.run(net, images)
        with kernels_compiled() as kernels, host_syncs(images.device.type) as syncs:
            for subnet in others:
                set_subnet(net.model, subnet)
                self.run(net, images)
        on_gpu = {"host_syncs": len(syncs), "kernels_compiled": len(kernels)} if images.is_cuda else {}
        return {**on_gpu, "graphs_compiled": self.graphs.count - graphs}


def subnets(network: Network) -> Iterator[Subnet]:
    """The whole supernet, one of listed channels, and then random ones, of leading and of listed channels in turn."""
    draw, topology = random.Random(0), topology_of(network)
    for number in range(2 + CHANGES):
        channels: dict[str, int | list[int]] = {}
        lists = {blocks.name: len(blocks.blocks) for blocks in topology.block_lists}
        depths = {name: depth if number < 2 else draw.randint(1, depth) for name, depth in lists.items()}
        for group in topology.inner:
            count = group.units if number == 0 else max(2, int(group.units * draw.choice(SHARES)))
            listed = number % 2 and count < group.units
            channels[group.name] = sorted(draw.sample(range(group.units), count)) if listed else count
        yield Subnet(channels, depths=depths)


@contextlib.contextmanager
def kernels_compiled() -> Iterator[list[str]]:
    """Collects the names of the kernels that Triton compiles, or loads from its cache on disk."""
    from triton import knobs

    found: list[str] = []
    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **given: found.append(given["repr"])
    try:
        yield found
    finally:
        knobs.runtime.jit_post_compile_hook = before


@contextlib.contextmanager
def host_syncs(device: str) -> Iterator[list[warnings.WarningMessage]]:
    """Collects torch's warnings of operations that make the host wait for a GPU."""
    found: list[warnings.WarningMessage] = []
    if device != "cuda":
        yield found
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
            found += [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
