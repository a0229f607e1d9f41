"""Models whose candidates are scored, and what their results are compared with."""

from collections import Counter

import torch
from torch import nn

from jdkd.experimental import PrunedCandidate, masked
from jdkd.nn import ElasticGroups
from tests.nn.elastic_models import GROUPS, Net, randomised


def counted(model: nn.Module) -> Counter:
    """Counts calls of modules by path, of those too whose outputs are given again; hooks would change what is."""
    calls = Counter()
    for path, module in model.named_modules():

        def forward(*args, path=path, run=module.forward, **kwargs):
            calls[path] += 1
            return run(*args, **kwargs)

        module.forward = forward
    return calls


def one_by_one(model, candidates, batch, groups) -> list:
    results = []
    for candidate in candidates:
        keep, skip = (candidate.keep, candidate.skip) if isinstance(candidate, PrunedCandidate) else (candidate, ())
        with masked(model, keep, groups, skip=skip), torch.no_grad():
            results.append(model(*batch) if isinstance(batch, tuple) else model(batch))
    return results


def assert_equal(ours: list, theirs: list) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def plain() -> Net:
    model = randomised(Net(), seed=3)
    model.elastic_groups = ElasticGroups(GROUPS)
    return model


class Chain(nn.Module):
    """Layers of one width in a row, each with a group of its own between it and the next."""

    def __init__(self, *between: nn.Module, layers: int = 4):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 6, 6, 1) for i in range(layers))
        self.between = nn.ModuleList(between or [nn.Identity()] * layers)
        pairs = range(layers - 1)
        self.elastic_groups = ElasticGroups({f"{i}": [(f"convs.{i}", "out"), (f"convs.{i + 1}", "in")] for i in pairs})
        self.eval()

    def forward(self, x):
        for conv, between in zip(self.convs, self.between, strict=True):
            x = between(conv(x))
        return x
