"""The heads that torchvision lacks learn, stay finite in half precision, and are rewritten, saved and distilled."""

import copy

import pytest
import torch
from torchvision.ops import box_iou

from jdkd.detect import load, narrowed, read, save
from jdkd.detect.heads import class_head, known_classes
from jdkd.detect.predictors import remake_predictors
from jdkd.distill import HeadDistiller, can_distil_heads
from jdkd.latency import fuse_for_inference
from jdkd.rewrite import Architecture, Rewrite
from tests.detect.places import KINDS, drawn, small

EXAMPLE = [torch.rand(3, 64, 64, generator=drawn(1))]
NONE = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
TINY = {"boxes": torch.tensor([[30.0, 31.0, 30.5, 31.5], [1.0, 1.0, 2.0, 2.0]]), "labels": torch.tensor([1, 2])}
TWICE = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]).expand(3, 4), "labels": torch.tensor([1, 2, 1])}


def scene():
    """A red 0 and a green 1."""
    image, boxes = torch.zeros(3, 64, 64), torch.tensor([[4.0, 6.0, 28.0, 30.0], [34.0, 32.0, 58.0, 56.0]])
    image[0, 6:30, 4:28] = 1
    image[0, 12:24, 11:21] = 0
    image[1, 32:56, 43:49] = image[1, 50:56, 34:58] = 1
    return image, {"boxes": boxes, "labels": torch.tensor([1, 2])}


@pytest.mark.parametrize("kind", KINDS)
def test_a_detector_finds_what_it_was_shown(kind):
    image, target = scene()
    model = small(kind).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sums = []
    for _ in range(80 if kind == "reppoints" else 45):
        loss = sum(model([image], [target]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sums.append(loss.item())
    assert sum(sums[-5:]) < 0.6 * sum(sums[:5])
    with torch.no_grad():
        (found,) = model.eval()([image])
    for box, label in zip(target["boxes"], target["labels"], strict=True):
        best = found["boxes"][found["labels"] == label][:3]
        assert box_iou(box[None], best).max() > 0.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_finite_in_half_precision_whatever_is_shown(kind, dtype):
    for targets in ([NONE, NONE], [TINY, NONE], [TWICE, TINY]):
        model = small(kind).train()
        with torch.autocast("cpu", dtype):
            losses = model(EXAMPLE * 2, targets)
        assert {loss.dtype for loss in losses.values()} == {torch.float32}
        sum(losses.values()).backward()
        assert all(loss.isfinite() and loss >= 0 for loss in losses.values()), losses
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_coupled_is_read_off_and_agrees_when_it_is_cut(kind):
    model = small(kind).eval()
    model.score_thresh = 0.0
    topology = read(model, size=(64, 64), check=True)
    assert not topology.unknown and not topology.unreached
    unchecked = read(model, size=(64, 64))
    units = [[(group.name, group.units) for group in each.groups] for each in (topology, unchecked)]
    assert units[0] == units[1] and topology.frozen == unchecked.frozen, "checking froze nothing"
    frozen = {tensor for each in topology.frozen for tensor, _ in each.tensors}
    heads = {name for name, p in model.named_parameters() if name.startswith("head.") and p.dim() == 4 and len(p) > 1}
    outs = {slot.tensor for group in topology.groups for slot in group.slots if slot.role == "out"}
    assert heads <= outs | frozen
    stuck = {"cls_logits", *({"initial_points", "refined_points"} if kind == "reppoints" else {"bbox_reg"})}
    assert {name.split(".")[-2] for name in frozen & heads} == stuck
    keep = {group.name: range(0, group.units, 2) for group in topology.groups}
    child = Rewrite(keep=keep).apply(model, topology)
    assert sum(p.numel() for p in child.parameters()) < 0.5 * sum(p.numel() for p in model.parameters())
    assert sum(child.train()(EXAMPLE, [TWICE]).values()).isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_narrowed_saved_fused_and_distilled_as_others_are(kind, tmp_path):
    whole = small(kind).eval()
    whole.architecture = Architecture("tests.detect.places:small", {"kind": kind}, classes=("cat", "dog"))
    thin = narrowed(whole, 0.5).eval()
    thin.score_thresh = 0.0
    save(tmp_path, thin)
    again = load(tmp_path)
    again.score_thresh = 0.0
    with torch.no_grad():
        (one,), (other,), (fused,) = (model(EXAMPLE) for model in (thin, again, fuse_for_inference(thin)))
    assert len(one["boxes"]) and torch.equal(one["boxes"], other["boxes"])
    torch.testing.assert_close(fused["scores"], one["scores"], rtol=1e-3, atol=1e-4)
    assert known_classes(whole) == 2 and class_head(whole).dense and can_distil_heads(thin, whole)
    with HeadDistiller(whole, copy.deepcopy(whole)) as distiller:
        whole(EXAMPLE)
        assert distiller.loss().item() == pytest.approx(0, abs=1e-4)
        whole.head.get_parameter(OF_CLASSES[kind]).data += 1
        whole(EXAMPLE)
        assert distiller.loss() > 0.01
    path = OF_CLASSES[kind].removesuffix(".bias")
    assert remake_predictors(whole, 6) == {f"head.{path}": (3, 6)}
    assert sum(whole.train()(EXAMPLE, [{**TWICE, "labels": torch.tensor([5, 4, 1])}]).values()).isfinite()


OF_CLASSES = {
    "atss": "classification_head.cls_logits.bias",
    "gfl": "classification_head.cls_logits.bias",
    "reppoints": "cls_logits.bias",
}
