"""The groups of a trace against those of Torch-Pruning (Fang et al., CVPR 2023), where it is installed."""

import pytest
import torch
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from jdkd.graph import trace

torch_pruning = pytest.importorskip("torch_pruning")


def test_backbone_and_pyramid_have_the_groups_of_torch_pruning():
    model = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5, returned_layers=None
    ).eval()
    x = torch.rand(1, 3, 64, 64)
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=x)
    names = {module: name for name, module in model.named_modules()}
    made = (torch_pruning.prune_conv_out_channels, torch_pruning.prune_batchnorm_out_channels)
    theirs = set()
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d]):
        layers = set()
        for dependency, _ in group:
            module = dependency.target.module
            if module in names and isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                is_out = dependency.handler in made or "out_channels" in dependency.handler.__name__
                layers.add((names[module], is_out or isinstance(module, nn.BatchNorm2d)))
        theirs.add(frozenset(layers))
    ours = set()
    for group in trace(model, x).groups:
        ours.add(frozenset((slot.tensor.rpartition(".")[0], slot.role != "in") for slot in group.slots))
    outputs = {f"fpn.layer_blocks.{k}.0" for k in range(4)}  # what the model returns, which we leave alone
    assert ours == {group for group in theirs if not outputs & {name for name, is_out in group if is_out}}
    assert len(ours) > 30
