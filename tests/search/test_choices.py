"""Who has children, who is trained on, and who is the student."""

import json
from types import SimpleNamespace

from jdkd.search import Cycle, pareto_front
from jdkd.search.choice import annealed, best_within, choose, contender, contenders, fitness
from jdkd.search.outcome import _predictor
from jdkd.search.strategy import Strategy
from tests.search.rows import candidate


def test_the_front_holds_what_nothing_beats():
    a, b, c, d = (
        candidate(0, map=0.40, ratio=1.0),
        candidate(1, map=0.38, ratio=0.8),
        candidate(2, map=0.37, ratio=0.9),
        candidate(3, map=0.41, ratio=1.1),
    )
    assert pareto_front([a, b, c, d]) == [b, a, d]
    assert pareto_front([a, candidate(4, map=0.40, ratio=1.05)]) == [a], "what is slower and no better is beaten"


def test_within_a_target_the_best_is_the_fastest_of_equals_and_then_the_last():
    slow, fast, last = (candidate(number, map=0.4, ratio=ratio) for number, ratio in enumerate((0.6, 0.5, 0.5)))
    better = candidate(3, map=0.5, ratio=0.7)
    assert best_within([fast, slow, last], 0.65) is last and best_within([better, slow], 0.65) is slow
    assert best_within([better, slow], 0.7) is better, "what is exactly as fast meets it"
    assert best_within([better, slow], 0.4) is None


def test_the_student_is_the_best_that_meets_the_target_or_the_fittest():
    slow, fast, faster = (candidate(i, map=m, ratio=r) for i, (m, r) in enumerate(((0.5, 0.9), (0.4, 0.7), (0.3, 0.6))))
    assert choose([slow, fast, faster], target=0.8) is fast
    assert choose([slow, fast, faster], target=0.5) is faster
    trained, hardly = candidate(1, map=0.374, ratio=0.436), candidate(2, map=0.247, ratio=0.428)
    assert choose([trained, hardly], target=0.35) is trained, "not whoever is a little faster"
    assert fitness(fast, 0.7) == fast.map and fitness(slow, 0.7) < slow.map
    as_long = candidate(1, map=0.690, ratio=0.747), candidate(2, map=0.659, ratio=0.720)
    assert fitness(as_long[0], 0.525) > fitness(as_long[1], 0.525), "a parent is cut anyway: 4 % of mAP are more"


def test_what_may_meet_the_target_by_its_interval_does_not_lose_to_what_is_far_worse():
    trained = candidate(1, map=0.751, ratio=0.5302, interval=(0.528, 0.532))
    short, slow = candidate(2, map=0.689, ratio=0.528), candidate(3, map=0.760, ratio=0.54, interval=(0.535, 0.545))
    assert choose([short, trained, slow], 0.53) is trained
    nearly = candidate(4, map=0.7505, ratio=0.529)
    assert choose([nearly, trained, slow], 0.53) is nearly, "what it is over the target counts"
    few = candidate(5, map=0.4, ratio=0.52, interval=(0.535, 0.55))  # of so few samples that its ratio lies outside
    assert choose([candidate(6, map=0.3, ratio=0.5), few], 0.53) is few


def test_who_was_not_trained_to_the_end_is_no_student_where_others_were():
    stopped = candidate(1, map=0.383, ratio=0.51)
    ended = candidate(2, map=0.374, ratio=0.51, cycles=(*stopped.cycles, Cycle(5, 0, 5, 1e-3)))
    slow = candidate(3, map=0.4, ratio=0.6, cycles=ended.cycles)
    assert [one.annealed for one in (stopped, ended, candidate(0, cycles=()))] == [False, True, False]
    assert annealed([stopped, ended, slow], 0.53) == [ended]
    assert annealed([stopped, slow], 0.53) == [stopped, slow], "which one of them has to decide otherwise"


def test_of_one_architecture_the_better_is_the_student():
    worse, better = candidate(1, map=0.3, ratio=0.9), candidate(2, map=0.4, ratio=0.9)
    for target in (0.95, 0.5):
        assert choose([worse, better], target) is choose([better, worse], target) is better
        assert pareto_front([worse, better]) == [better]
    assert choose([better, worse], 0.95, least=0.3) is choose([worse, better], 0.95, least=0.3) is better


def test_of_equals_the_faster_is_the_student_and_is_timed_and_trained_on_first():
    slow, fast = candidate(1, map=0.4, ratio=0.9), candidate(2, map=0.4, ratio=0.8)
    for both in ([slow, fast], [fast, slow]):
        assert choose(both, 0.95) is contender(both, 0.95, set()) is contenders(both, 0.95)[0] is fast


def test_of_equals_the_one_that_was_trained_longer_is_the_student():
    short, long = (candidate(number, ratio=0.9, lineage_steps=10 * number) for number in (1, 2))
    for target, least in ((0.95, None), (0.95, 0.3), (0.5, None)):
        assert choose([short, long], target, least) is long


def test_where_an_map_is_enough_the_fastest_that_has_it_is_the_student():
    slow, fast, faster = (candidate(i, map=m, ratio=r) for i, (m, r) in enumerate(((0.5, 0.5), (0.4, 0.4), (0.3, 0.3))))
    everyone = [slow, fast, faster]
    assert choose(everyone, 0.53, least=0.35) is fast and choose(everyone, 0.53, least=0.2) is faster
    assert choose(everyone, 0.53, least=0.9) is slow, "where nobody has it, the best"
    assert choose(everyone, 0.53) is slow
    assert choose(everyone, 0.53, least=0.5) is slow and choose(everyone, 0.53, least=0.4) is fast, "just enough"
    assert contender(everyone, 0.53, set(), least=0.35) is fast, "and that one is timed at length"
    assert contender(everyone, 0.53, {fast.architecture_id}, least=0.35) is None


def test_finalists_are_the_fittest_one_of_each_architecture():
    near, same, far = (
        candidate(1, map=0.40, ratio=0.5),
        candidate(2, map=0.35, ratio=0.5, architecture_id="architecture 1"),
        candidate(3, map=0.50, ratio=1.0),
    )
    assert contenders([far, same, near], 0.5) == [near, far], "what is too slow yet counts for less"
    assert contenders([far, same, near], 1.0) == [far, near]
    barely, fast = candidate(7, map=0.658, ratio=0.533), candidate(8, map=0.560, ratio=0.477)
    far = candidate(9, map=0.9, ratio=0.7)
    assert contenders([fast, far, barely], 0.53) == [barely, fast, far], "it needs but a little cut"


def test_whoever_may_be_the_student_is_timed_at_length_before_one_is_chosen():
    slow = candidate(1, map=0.6, ratio=0.95, interval=(0.9, 1.0))
    near = candidate(2, map=0.5, ratio=0.83, interval=(0.78, 0.88))
    sure, worse = candidate(3, map=0.4, ratio=0.6), candidate(4, map=0.3, ratio=0.5)
    students, timed = [worse, sure, near, slow], set()
    assert contender(students, 0.8, timed) is near, "by its interval it may meet the target"
    assert contender(students, 0.8, timed | {near.architecture_id}) is sure, "it does not, and the next one may"
    assert contender(students, 0.8, timed | {near.architecture_id, sure.architecture_id}) is None
    met = candidate(2, map=0.5, ratio=0.79, interval=(0.785, 0.795))
    assert contender([worse, sure, met, slow], 0.8, {met.architecture_id}) is None
    assert choose([worse, sure, met, slow], 0.8) is met


def test_where_no_one_meets_the_target_the_fittest_is_timed_at_length():
    slow, fast = candidate(1, map=0.6, ratio=0.95), candidate(2, map=0.5, ratio=0.8)
    assert contender([slow, fast], 0.5, set()) is fast
    assert contender([slow, fast], 0.5, {fast.architecture_id}) is None
    slower = candidate(2, map=0.5, ratio=0.97)
    assert contender([slow, slower], 0.5, {slower.architecture_id}) is slow, "at length it was not the fastest"


def test_what_one_architecture_cannot_tell_of_the_predictor_is_null_in_json():
    base, one, two = (candidate(number, ratio=1 - number / 10, predicted=0.9) for number in range(3))
    for scored, told in (([base], (0, None, None)), ([base, one], (1, None, 0.0)), ([base, one, two], (2, 0.0, 6.25))):
        found = _predictor(SimpleNamespace(scored=scored))
        assert (found["architectures"], found["kendall_tau"]) == told[:2]
        error = found["mean_absolute_percentage_error"]
        assert error is told[2] if told[2] is None else abs(error - told[2]) < 1e-9
        json.dumps(found, allow_nan=False)


def test_a_target_whose_last_candidates_failed_goes_on_with_those_before():
    base, explored = candidate(0, generation=0), candidate(1, generation=1)
    halved, other, alone = (
        candidate(number, generation=generation, target=target)
        for number, (generation, target) in enumerate(((2, 0.75), (2, 0.5), (3, 0.5)), start=2)
    )  # that of 0.75 in generation 3 failed

    def running(target, *scored):
        return Strategy._running(SimpleNamespace(), SimpleNamespace(scored=[base, *scored]), target)

    everyone = explored, halved, other, alone
    assert running(0.75, *everyone) == [halved] and running(0.5, *everyone) == [alone]
    assert running(0.35, *everyone) == [explored] and running(0.35) == [base]
