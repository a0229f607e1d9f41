"""Batches of images of one shape, whichever of them is asked for first."""

from collections import Counter

import numpy as np
import pytest

from jdkd.data.order import Order


def walked(size, batch, seed, groups, batches):
    """The same by walking from the first image on, with a batch under way for each group."""
    under_way = {group: [] for group in set(groups.tolist())}
    found, epoch = [], 0
    while len(found) < batches:
        for image in np.random.default_rng((seed, 0, epoch)).permutation(size).tolist():
            filling = under_way[groups[image]]
            filling.append(image)
            if len(filling) == batch:
                found.append([*filling])
                filling.clear()
        epoch += 1
    return found[:batches]


@pytest.mark.parametrize(("size", "batch", "portraits"), [(50, 4, 11), (50, 1, 11), (17, 8, 9), (9, 4, 4), (31, 5, 6)])
def test_any_batch_is_the_one_that_a_walk_through_the_epochs_comes_to(size, batch, portraits):
    groups = np.random.default_rng(0).permutation(size) < portraits
    expected = walked(size, batch, 7, groups, 60)
    order = Order(size, batch, 7, groups)
    for number in np.random.default_rng(1).permutation(60).tolist():  # in any order
        assert order[number] == expected[number]
    assert all(len({groups[image] for image in images}) == 1 for images in expected)


@pytest.mark.parametrize(("size", "batch"), [(7, 3), (7, 7), (7, 16), (1, 4)])
def test_one_group_gives_the_epochs_laid_end_to_end(size, batch):
    order = Order(size, batch, 3)
    ours = [image for number in range(30) for image in order[number]]
    theirs = [image for epoch in range(90) for image in np.random.default_rng((3, 0, epoch)).permutation(size)]
    assert ours == theirs[: 30 * batch] or (size == 1 and set(ours) == {0})


def test_every_image_comes_as_often_as_every_other():
    groups = np.arange(40) % 5 == 0
    order = Order(40, 4, 0, groups)
    counts = Counter(image for number in range(200) for image in order[number])
    assert len(counts) == 40 and set(counts.values()) == {20}


def test_a_group_of_less_than_a_batch_is_no_group_of_its_own():
    rare = np.arange(40) < 3
    assert [Order(40, 4, 0, rare)[k] for k in range(30)] == [Order(40, 4, 0)[k] for k in range(30)]


def test_a_far_batch_is_found_without_those_before_it():
    order = Order(1000, 16, 0, np.arange(1000) % 3 == 0)
    order._epoch, looked_at = (lambda epoch, find=order._epoch: looked_at.add(epoch) or find(epoch)), set()
    assert len(set(order[10**9])) == 16 and len(looked_at) <= 2
