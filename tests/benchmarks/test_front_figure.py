"""The picture of the front page shows what the rows say, and no more."""

import re

from benchmarks import front_figure

POINT = re.compile(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="5" fill="(#\w+|none)"')


def student(score, ratio):
    return {"map": score, "latency_ratio": ratio, "latency_ratio_interval": [ratio - 0.01, ratio + 0.01]}


def search(*students, control=0.36, seed=0):
    base = {"map": 0.35, "latency_ratio": 1.0}
    return {"base": base, "control": base | {"map": control}, "students": list(students), "seed": seed}


def test_every_student_base_and_control_is_a_point_where_its_row_says():
    fronts = [search(student(0.30, 0.4), student(0.40, 0.8))]
    drawn = front_figure.figure({"blood_cells_deep": [search(student(0.38, 0.5))], "blood_cells_deep_front": fronts})
    points = [(float(x), float(y), fill) for x, y, fill in POINT.findall(drawn)]
    (base,) = [point for point in points if point[2] == "none"]
    (own,) = [point for point in points if point[2] == "#D55E00"]
    small, large = sorted(point for point in points if point[2] == "#0072B2")
    assert small[0] < own[0] < large[0] < base[0], "faster is further left"
    assert large[1] < own[1] < base[1] < small[1], "better is further up"
    assert drawn.count("<rect") == 1 and drawn.count("stroke-dasharray") == 1


def test_of_a_seed_that_was_searched_twice_the_later_search_is_shown_as_in_the_tables():
    rows = [search(student(0.31, 0.5)), search(student(0.39, 0.5), seed=1), search(student(0.37, 0.5))]
    later, first = (front_figure.figure({"blood_cells_deep": each}) for each in (rows, rows[:2]))
    assert sorted(POINT.findall(later)) == sorted(POINT.findall(front_figure.figure({"blood_cells_deep": rows[1:]})))
    assert len(POINT.findall(later)) == len(POINT.findall(first)) == 4 and later != first


def test_a_control_that_failed_is_no_point_and_no_search_no_picture():
    failed = search(student(0.38, 0.5)) | {"control": {"failure": "it diverged"}}
    assert "<rect" not in front_figure.figure({"blood_cells_deep": [failed]})
    assert front_figure.figure({"blood_cells_deep": []}) == ""
