"""Two processes train what one does."""

import json
import socket
from dataclasses import replace

import pytest
import torch

from jdkd.errors import InputError
from jdkd.train import evaluate, fit
from tests.detectors import CLASSES
from tests.ranks import started
from tests.train.two_processes import CONFIG, CURVE, Finder, Toy, as_torchrun_starts_it, net, opened


@pytest.fixture(scope="module")
def two(digits, tmp_path_factory):
    """What each of the two found, and their folder."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started(as_torchrun_starts_it, port, folder, digits[0].split.images.parent)
    return [torch.load(folder / f"{place}.pt", weights_only=False) for place in range(2)], folder


@pytest.fixture(scope="module")
def one(digits):
    """The same training in one process, with batches of twice the size."""
    toy = Toy()
    fit(toy, digits[0], replace(CONFIG, batch_size=2 * CONFIG.batch_size), device="cpu")
    return toy


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(two, one):
    found, folder = two
    before = Toy().state_dict()
    for name, tensor in one.state_dict().items():
        if name != "seen":
            torch.testing.assert_close(found[0]["toy"][name], tensor, rtol=1e-5, atol=1e-7)
            assert torch.equal(tensor, before[name]) == (name == "unused"), name
    assert [each["processes"] for each in found] == [2, 2]
    size = CONFIG.batch_size
    shares = [each["order"] for each in found]
    together = [one for at in range(0, len(shares[0]), size) for share in shares for one in share[at : at + size]]
    assert together == one.order and len(together) == 2 * size * CONFIG.steps
    rows = [json.loads(line) for line in (folder / "whole" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4], "one process writes"


def test_both_end_with_the_model_of_the_first(two):
    first, second = two[0]
    assert float(first["toy"]["seen"]) == CONFIG.steps
    for what in ("toy", "resumed", "pool"):
        assert all(torch.equal(tensor, second[what][name]) for name, tensor in first[what].items()), what
    assert first["drawn"] == second["drawn"]


def test_two_processes_end_bit_for_bit_where_they_would_have_without_an_interruption(two):
    first = two[0][0]
    assert all(torch.equal(tensor, first["resumed"][name]) for name, tensor in first["toy"].items())


def test_what_goes_wrong_in_one_ends_both(two):
    first, second = two[0]
    assert first["diverged"] == (2, "gradient norm") and second["diverged"] == (2, "loss")
    assert first["raised"] == second["raised"] == "'missing'"


def test_both_score_the_pool_and_the_first_writes_it(two, digits):
    found, folder = two
    assert [each["members"] for each in found] == [1, 1]
    assert (folder / "pool" / "pool.json").is_file() and not (folder / "pool" / "training").exists()


def losses_of(folder):
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [[row["losses"][name] for name in sorted(row["losses"])] for row in rows]


@pytest.mark.parametrize("settings", [{"batch_size": 4}, {"accumulate": 2}])
def test_two_processes_have_the_loss_curve_of_one_with_as_many_images(two, settings, tmp_path):
    found, folder = two
    model = net(CLASSES)
    fit(model, opened(folder / "scenes"), replace(CURVE, **settings), device="cpu", folder=tmp_path)
    ours, theirs = torch.tensor(losses_of(tmp_path)), torch.tensor(losses_of(folder / "curve"))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)
    assert (ours[:-1] - ours[1:]).sum(1).abs().min() > 1e-3, "every step moves the losses by more than the tolerance"
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[0]["curve"][name], tensor, rtol=1e-4, atol=1e-5)


def test_two_processes_score_what_one_does(two):
    found, folder = two
    scores = evaluate(Finder(), opened(folder / "scenes"), device="cpu", batch_size=3)
    assert found[0]["scores"] == found[1]["scores"] == scores and 0.5 < scores.map < 1


def test_an_image_that_one_of_two_cannot_read_is_said_by_both(two):
    first, second = two[0]
    assert first["unreadable"] == second["unreadable"] and "none.png is missing" in first["unreadable"]


def test_a_training_of_two_processes_is_not_carried_on_by_one(two, digits):
    with pytest.raises(InputError, match="processes was 2 and is 1"):
        fit(Toy(), digits[0], CONFIG, device="cpu", folder=two[1] / "cut", resume=True)
