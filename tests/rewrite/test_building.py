"""What a model is made of, as data: read off it, written, and built again elsewhere."""

import copy
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from jdkd.detect import read
from jdkd.errors import InputError
from jdkd.graph import Topology, trace
from jdkd.notices import Notice
from jdkd.rewrite import (
    Architecture,
    Rewrite,
    arrange,
    build,
    describe,
    load_architecture,
    prune,
    save_architecture,
    widen,
)
from tests.detectors import hide_own_detectors
from tests.rewrite.tiny import SOURCE

IMAGES = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
NO_WEIGHTS = {"weights": None, "weights_backbone": None}
ELSEWHERE = """
import sys, torch
sys.path.insert(0, {folder!r})
from jdkd.rewrite import load_architecture
model = load_architecture({checkpoint!r})
with torch.no_grad():
    torch.save(model(*torch.load({images!r})), {out!r})
print(*(name for name in sys.modules if name.startswith("jdkd.detect")))
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The module's import name."""
    (tmp_path / "tiny_nets.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny_nets", raising=False)
    yield "tiny_nets"
    sys.modules.pop("tiny_nets", None)


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every number of a model anything but its default."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and name != "table":
                tensor.copy_(torch.rand(tensor.shape, generator=generator) - (0 if "running" in name else 0.4))
    return model.eval()


def rewritten(model: nn.Module, topology: Topology, lists) -> nn.Module:
    """Cut by 30 %, one block dropped, one added."""
    cut = prune(model, topology, {g.name: range(max(1, round(0.7 * g.units))) for g in topology.groups})
    return drawn(arrange(cut, topology, lists), seed=3)


def elsewhere(tmp_path, checkpoint, images):
    """What a model of a checkpoint makes in a process of its own."""
    torch.save(images, tmp_path / "images.pt")
    files = {"images": str(tmp_path / "images.pt"), "out": str(tmp_path / "out.pt")}
    script = ELSEWHERE.format(folder=str(tmp_path), checkpoint=str(checkpoint), **files)
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # another number sums in another order
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=threads, check=False)
    assert answer.returncode == 0, answer.stderr
    return torch.load(tmp_path / "out.pt"), answer.stdout.split()


@torch.no_grad()
def test_what_was_cut_dropped_and_added_is_built_again_in_a_fresh_process(tiny, tmp_path):
    model = drawn(build(Architecture(f"{tiny}:net", {"width": 24})))
    ours = rewritten(model, trace(model, IMAGES), {"blocks": [0, 2, 3, 3], "named": [0, 2, 2]})
    ours.scale = 0.5
    found = describe(ours, f"{tiny}:net", {"width": 24}, classes=("a", "b", "c"))
    assert found.blocks == {"blocks": (0, 2, 3, 1), "named": (0, 2, 2)}  # the second 3 is like 1
    assert found.attributes == {"scale": 0.5}
    assert Architecture.from_json(found.to_json()) == found
    save_architecture(tmp_path / "net", ours, found)
    theirs, family = elsewhere(tmp_path, tmp_path / "net", (IMAGES,))
    assert torch.equal(theirs, ours(IMAGES)) and family == []


@torch.no_grad()
def test_a_detector_of_torchvision_is_built_again_without_this_packages_detectors(tmp_path, monkeypatch):
    builder, arguments = "torchvision.models.detection:ssdlite320_mobilenet_v3_large", NO_WEIGHTS
    model, image = drawn(build(Architecture(builder, arguments))), [torch.rand(3, 64, 96)]
    topology = trace(model, image)
    lists = {blocks.name: range(len(blocks.blocks)) for blocks in topology.block_lists}
    longest = max(lists, key=lambda name: len(lists[name]))
    ours = rewritten(model, topology, {longest: [*lists[longest][1:], *2 * [lists[longest][-1]]]})
    ours.score_thresh, ours.topk_candidates = 0.0, 20
    found = describe(ours, builder, arguments)
    assert found.blocks and found.attributes["topk_candidates"] == 20
    save_architecture(tmp_path / "ssdlite", ours, found)
    hide_own_detectors(monkeypatch)
    theirs, mine = load_architecture(tmp_path / "ssdlite")(image), ours(image)
    assert len(mine[0]["boxes"])
    assert all(torch.equal(theirs[0][key], mine[0][key]) for key in mine[0])


def test_a_mask_rcnn_of_a_resnet_101_is_built_in_under_a_second(tiny):
    build(Architecture(f"{tiny}:mask_rcnn_r101"), "meta")  # imports torchvision
    start = time.process_time()
    model = build(Architecture(f"{tiny}:mask_rcnn_r101", shapes={"backbone.body.conv1.weight": (32, 3, 7, 7)}), "meta")
    assert time.process_time() - start < 1
    assert len(model.backbone.body.layer3) == 23 and model.backbone.body.conv1.out_channels == 32


def test_a_resnet_101_is_read_rewritten_and_built_in_under_five_seconds(tiny):
    """On one core; a quarter of that where nothing else runs."""
    begun, threads = time.process_time(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = build(Architecture(f"{tiny}:mask_rcnn_r101"), "meta")
        model = model.to_empty(device="cpu").eval()
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.fill_(0.01)
        model.architecture = Architecture(f"{tiny}:mask_rcnn_r101")
        topology = read(model)
        keep = {group.name: range(max(1, round(0.7 * group.units))) for group in topology.groups}
        child = Rewrite(keep=keep).apply(model, topology)
        again = build(child.architecture, "meta")
    finally:
        torch.set_num_threads(threads)
    assert time.process_time() - begun < 5
    assert [p.shape for p in again.parameters()] == [p.shape for p in child.parameters()]
    assert sum(p.numel() for p in child.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())


def test_layers_know_their_sizes_and_ties_are_kept(tiny, tmp_path):
    model = drawn(build(Architecture(f"{tiny}:net")))
    ours = rewritten(model, trace(model, IMAGES), {"blocks": [0, 1]})
    save_architecture(tmp_path / "net", ours, describe(ours, f"{tiny}:net"))
    loaded = load_architecture(tmp_path / "net")
    assert loaded.first.weight is loaded.second.weight and not loaded.training
    assert not loaded.stem.weight.requires_grad and loaded.first.weight.requires_grad
    for (name, one), (_, other) in zip(ours.named_modules(), loaded.named_modules(), strict=True):
        assert repr(one) == repr(other), name
    assert list(loaded.state_dict()) == list(ours.state_dict())


def test_what_grew_is_built_again(tiny, tmp_path):
    model = drawn(build(Architecture(f"{tiny}:net")))
    topology = trace(model, IMAGES)
    ours = drawn(widen(model, topology, {group.name: 1 for group in topology.groups}))
    save_architecture(tmp_path / "net", ours, describe(ours, f"{tiny}:net"))
    with torch.no_grad():
        assert torch.equal(load_architecture(tmp_path / "net")(IMAGES), ours(IMAGES))


def test_blocks_are_found_by_what_they_do(tiny):
    model = build(Architecture(f"{tiny}:net"))
    topology = trace(model, IMAGES)
    for order, expected in {
        (2, 0): (2, 3),  # the one with dilation is another
        (1, 2, 3): (0, 2, 3),  # 0 and 1 are alike, so it is one architecture with [0, 2, 3]
        (0, 1, 2, 3, 2): (0, 1, 2, 3, 2),
        (3, 2, 1, 0): (0, 2, 3, 1),
    }.items():
        ours = arrange(model, topology, {"blocks": order})
        assert describe(ours, f"{tiny}:net").blocks == {"blocks": expected}, order
    assert describe(arrange(model, topology, {"blocks": [1, 0, 2, 3]}), f"{tiny}:net").blocks == {}


def test_the_id_is_that_of_the_content():
    one = Architecture("a.b:c", {"x": 1, "y": [2, 3]}, shapes={"p": [1], "q": [2, 3]})
    other = Architecture("a.b:c", {"y": (2, 3), "x": 1}, shapes={"q": (2, 3), "p": (1,)})
    assert one.id == other.id and one == other and len(one.id) == 64 and hash(one) == hash(other)
    assert one.id == Architecture.from_json(json.dumps(json.loads(one.to_json()), sort_keys=False)).id
    assert one.id != one.replace(shapes={"p": [2]}).id


def test_only_parameters_are_without_memory(tiny):
    model = build(Architecture(f"{tiny}:net"), "meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.first.weight is model.second.weight
    assert torch.equal(model.anchors[0], torch.arange(4.0) + 1) and not any(b.is_meta for b in model.buffers())


@pytest.mark.parametrize("builder", ["peeks", "kept", "derived", "recurrent", "parametrized", "wrapped"])
def test_builders_that_compute_with_weights_or_keep_them_are_built_all_the_same(tiny, tmp_path, builder):
    ours = drawn(build(Architecture(f"{tiny}:{builder}")))
    before = torch.get_rng_state()
    told = pytest.warns(Notice, match="doubled") if builder == "derived" else nullcontext()
    with told:
        save_architecture(tmp_path / "net", ours, describe(ours, f"{tiny}:{builder}"))
    with torch.no_grad():
        assert torch.equal(load_architecture(tmp_path / "net")(IMAGES), ours(IMAGES))
    assert torch.equal(before, torch.get_rng_state())


def test_a_builder_that_keeps_its_module_keeps_it_as_it_was(tiny):
    kept = sys.modules[tiny].KEPT if tiny in sys.modules else None
    made = build(Architecture(f"{tiny}:kept", blocks={"blocks": [0]}, attributes={"scale": 3.0}))
    kept = sys.modules[tiny].KEPT
    assert len(kept.blocks) == 4 and kept.scale == 1.5 and len(made.blocks) == 1


def test_buffers_that_are_not_persistent_are_kept_where_they_are_ones_own(tiny, tmp_path):
    ours = drawn(build(Architecture(f"{tiny}:net")))
    ours.table.mul_(3)
    save_architecture(tmp_path / "net", ours, describe(ours, f"{tiny}:net"))
    assert torch.equal(load_architecture(tmp_path / "net").table, ours.table)


def test_fresh_weights_are_the_builders(tiny):
    changed = Architecture(f"{tiny}:net", shapes={"out.weight": (5, 12), "out.bias": (5,), "offset": (5,)})
    build(changed)
    torch.manual_seed(2)
    plain = build(changed.replace(shapes={}))
    torch.manual_seed(2)
    grown = build(changed)
    assert torch.equal(grown.out.weight[:3], plain.out.weight) and grown.out.out_features == 5
    assert grown(IMAGES).shape == (2, 5)


def test_reduced_precision_is_kept(tiny, tmp_path):
    ours = drawn(build(Architecture(f"{tiny}:net"))).bfloat16()
    save_architecture(tmp_path / "net", ours, describe(ours, f"{tiny}:net"))
    loaded = load_architecture(tmp_path / "net")
    assert {t.dtype for t in loaded.state_dict().values() if t.is_floating_point()} == {torch.bfloat16}
    assert loaded.table.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "a builder"),
        ({"builder": "a:b", "channels": {}}, "channels"),
        ({"builder": "mine"}, "package.module:function"),
        ({"builder": 3}, "package.module:function"),
        ({"builder": "a:b", "shapes": {"w": [0]}}, "at least 1"),
        ({"builder": "a:b", "shapes": {"w": [2.5]}}, "'w'"),
        ({"builder": "a:b", "shapes": [1]}, "shapes must map"),
        ({"builder": "a:b", "blocks": {"c": [-1]}}, "'c'"),
        ({"builder": "a:b", "blocks": {"c": []}}, "at least one child"),
        ({"builder": "a:b", "arguments": 3}, "arguments must map"),
        ({"builder": "a:b", "classes": "cat"}, "list of names"),
        ({"builder": "a:b", "classes": [1]}, "list of names"),
        ({"builder": "a:b", "classes": None}, "must be a list of names, got None"),
        ([1], "got list"),
    ],
)
def test_what_is_no_architecture_is_refused(fields, words):
    with pytest.raises(InputError, match=words) as refused:
        Architecture.from_json(json.dumps(fields), source="here.json")
    assert "here.json" in str(refused.value)


@pytest.mark.parametrize("value", [torch.ones(1), float("nan"), object()])
def test_arguments_that_json_does_not_have_are_refused(value):
    with pytest.raises(InputError, match="arguments can hold only what JSON has"):
        Architecture("a:b", {"x": value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"builder": "nowhere:net"}, "names the module nowhere"),
        ({"builder": "tiny_nets:missing"}, "has no attribute 'missing'"),
        ({"builder": "tiny_nets:number"}, "is a int"),
        ({"builder": "tiny_nets:list_of_one"}, "returned a list"),
        ({"builder": "tiny_nets:raising", "arguments": {"width": 7}}, "width=7 raised RuntimeError: no such file"),
        ({"builder": "tiny_nets:lazy"}, "lazy layers without a size"),
        ({"builder": "tiny_nets:scripted"}, "scripted or traced"),
        ({"arguments": {"depth": 3}}, "depth=3 raised TypeError"),
        ({"builder": "broken_nets:net"}, "broken_nets raised SyntaxError"),
        ({"builder": "needy_nets:net"}, "needs the package not_installed_anywhere"),
        ({"blocks": {"nothing": [0]}}, "blocks names 'nothing'"),
        ({"blocks": {"blocks": [4]}}, "makes 4 there"),
        ({"shapes": {"out.weights": [3, 12]}}, "makes none"),
        ({"shapes": {"out.weight": [3]}}, r"makes \[3, 12\]"),
        ({"attributes": {"scales": 2}}, "makes none"),
        ({"attributes": {"out": 2}}, "makes a Linear"),
    ],
)
def test_what_cannot_be_built_is_refused(tiny, tmp_path, changes, words):
    (tmp_path / "broken_nets.py").write_text("def net(:\n")
    (tmp_path / "needy_nets.py").write_text("import not_installed_anywhere\n")
    architecture = Architecture(**{"builder": f"{tiny}:net", **changes})
    for device in ("cpu", "meta"):
        with pytest.raises(InputError, match=words):
            build(architecture, device)


def test_a_model_of_another_builder_is_refused(tiny):
    model = build(Architecture(f"{tiny}:net"))
    folded = copy.deepcopy(model)
    folded.blocks[1].norm = nn.Identity()
    with pytest.raises(InputError, match=r"blocks\.1\.norm is a torch\.nn.*Identity"):
        describe(folded, f"{tiny}:net")
    with pytest.raises(InputError, match=r"the model is a .*Sequential, and the builder makes a tiny_nets\.Net"):
        describe(model.blocks, f"{tiny}:net")
    folded.blocks = nn.Sequential(nn.ReLU(), *model.blocks)
    with pytest.raises(InputError, match="blocks has the children 0, 1, 2, 3, 4, which are not all among"):
        describe(folded, f"{tiny}:net")
    model.register_buffer("mine", torch.ones(1))
    with pytest.raises(InputError, match="only the model has a tensor mine"):
        describe(model, f"{tiny}:net")


def test_a_model_that_its_architecture_does_not_describe_is_not_written(tiny, tmp_path):
    model = build(Architecture(f"{tiny}:net"))
    with pytest.raises(InputError, match=r"offset is \[3\] in the first and \[4\] in the second; describe"):
        save_architecture(tmp_path / "net", model, Architecture(f"{tiny}:net", {"classes": 4}))
    counting = build(Architecture(f"{tiny}:Counting"))
    with pytest.raises(InputError, match="state _extra_state is no tensor"):
        save_architecture(tmp_path / "net", counting, Architecture(f"{tiny}:Counting"))
    assert not (tmp_path / "net").exists()


def test_checkpoints_that_cannot_be_read_are_refused(tiny, tmp_path):
    model, folder = build(Architecture(f"{tiny}:net")), tmp_path / "net"
    save_architecture(folder, model, describe(model, f"{tiny}:net"))
    text, weights = (folder / "architecture.json").read_text(), (folder / "weights.safetensors").read_bytes()

    def refused(words):
        with pytest.raises(InputError, match=words):
            load_architecture(folder)
        (folder / "architecture.json").write_text(text)
        (folder / "weights.safetensors").write_bytes(weights)

    (folder / "architecture.json").write_bytes(b"\xff\xfe{")
    refused("not UTF-8")
    (folder / "architecture.json").write_text("{")
    refused("not JSON")
    (folder / "architecture.json").write_text(text.replace('"arguments": {}', '"arguments": {"classes": 5}'))
    refused(r"offset is \[3\] in the first and \[5\] in the second; keep the two files")
    (folder / "architecture.json").write_text(text.replace("tiny_nets:net", "gone_nets:net"))
    refused("architecture.json: 'gone_nets:net' names the module gone_nets, .*PYTHONPATH")
    (folder / "weights.safetensors").write_bytes(weights[:100])
    refused("cannot be read")
    (folder / "weights.safetensors").unlink()
    refused("has no weights.safetensors")


class Boxed(nn.Module):
    """Holds numbers where no state dict and no plain attribute has them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.anchors, self._limits, self.seen = [torch.ones(2)], {"most": 3}, {}
        self.coder = SimpleNamespace(weights=(1.0, 2.0))


def boxed() -> nn.Module:
    return Boxed()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("anchors", lambda model: model.anchors[0].mul_(2)),
        ("_limits", lambda model: model._limits.update(most=4)),
        ("coder", lambda model: setattr(model.coder, "weights", (1.0, 1.0))),
    ],
)
def test_numbers_that_an_architecture_cannot_say_are_named(name, change):
    model = Boxed()
    change(model)
    with pytest.warns(Notice, match=f"{name} of the Boxed is not what .*:boxed makes"):
        describe(model, f"{__name__}:boxed")


def test_what_fills_while_a_model_runs_or_is_rounded_is_not_named():
    model = Boxed()
    model.seen["a size"] = torch.rand(3)
    model.anchors[0] = model.anchors[0].half() * 1.001
    assert not describe(model, f"{__name__}:boxed").attributes


def test_an_attribute_that_became_a_number_from_a_pair_is_built_again():
    model = boxed()
    model.conv.padding = 0
    assert build(describe(model, f"{__name__}:boxed")).conv.padding == 0
