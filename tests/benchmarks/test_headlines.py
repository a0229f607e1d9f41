"""The sentences of the front page compare what was measured together."""

from benchmarks import headlines


def row(provider, median_us, device, time, **case):
    named = {
        "op": "any",
        "provider": provider,
        "median_us": median_us,
        "device": device,
        "time": time,
        "layout": "NCHW",
    }
    return headlines.LOSS | named | {"peak_bytes": 1e6} | case


def test_a_ratio_is_of_one_machine_and_one_run():
    slow = [row(name, 1e3 * ms, "slow", 1) for name, ms in (("eager", 90), ("torch.compile", 30), ("jdkd cpu", 10))]
    quick = [row(name, 1e3 * ms, "quick", 2) for name, ms in (("eager", 8), ("jdkd cpu", 2))]
    again = [row(name, 1e3 * ms, "slow", 3) for name, ms in (("torch.compile", 20), ("jdkd cpu", 5))]
    said = headlines.sentences(slow, [], [])
    assert "slow: 10 ms, 9 times as fast as its formula in torch and 3 times as fast as torch.compile of it" in said
    assert headlines.sentences(slow + quick + again, [], []) == said, "the others lack something to compare with"
    assert headlines.sentences(quick + again, [], []) == "- **PKD's loss**: not measured."
    whole, half = (row(name, ms, "slow", 1, **headlines.CONVOLUTION) for name, ms in (("full_width", 4), ("jdkd", 1)))
    said = headlines.sentences([], [whole, half], [])
    assert "takes 0.25 of the time of all of it, on slow" in said
    assert headlines.sentences([], [whole, half, half | {"device": "quick", "median_us": 2}], []) == said


def test_a_factor_is_of_all_that_was_kept_and_of_all_three_detectors():
    known = {"ingredient": headlines.ALL, "size": [128, 192], "device": "slow"}
    rows = [known | {"case": case, "alone": [0.5 + 0.1 * i, 0, 1]} for i, case in enumerate(headlines.ACCELERATED)]
    said = headlines.sentences([], [], [*rows, rows[0] | {"ingredient": "folded", "alone": [9, 9, 9]}])
    assert (
        "take 0.50 (RetinaNet R50), 0.60 (Faster R-CNN R50), 0.70 (FCOS R50) of their time at 128 x 192, slow" in said
    )
    assert "accelerated" not in headlines.sentences([], [], rows[:2])
