"""How fast images reach the training loop: rows of drawn images, and the tables."""

from benchmarks import data_loading


def test_files_are_decoded_and_read_in_batches(tmp_path):
    data = data_loading.drawn(tmp_path, 3)
    rows = [*data_loading.rates(data, 3, 2, [0])]
    assert [row["done"] for row in rows] == ["decoded by Pillow", "decoded by jdkd", "batches, no worker"]
    for row in rows:
        least, most = row["per_core_spread"]
        assert row["size"].startswith("640x480 JPEG, ") and 0 < least <= row["per_core"] <= most and row["rounds"] == 2


def test_a_rate_is_of_all_rounds_and_of_processor_time(monkeypatch):
    clock, processor = iter([0.0, 4.0, 10.0, 12.0, 20.0, 21.0]), iter([0.0, 2.0, 3.0, 4.0, 5.0, 5.5])
    monkeypatch.setattr(data_loading.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(data_loading, "processor_seconds", lambda: next(processor))
    rate = data_loading.measured(8, lambda: None, 3)
    assert rate == {"per_core": 8.0, "per_core_spread": [4.0, 16.0], "clock": 4.0, "rounds": 3}


def test_the_tables_have_the_latest_rows():
    read = {
        "row": "images",
        "device": "A CPU",
        "images": "mine",
        "size": "64x48 PNG, 9 KiB",
        "done": "batches, no worker",
    }
    read |= {"per_core": 90.4, "per_core_spread": [80.0, 95.0], "clock": 70.1, "cores": 1}
    index = {"row": "index", "device": "A CPU", "opened": "again", "images": 1200, "boxes": 4500, "bytes": 2.5e6}
    index |= {"seconds": 9.04, "processor_seconds": 7.0, "mib": 600.2}
    workers = read | {"done": "batches, 2 workers", "cores": 2, "clock": 171.2}
    images, annotations = data_loading.table([read | {"per_core": 1.0}, index, read, workers]).split("\n\n")
    assert images.splitlines()[2:] == [
        "| A CPU | mine | 64x48 PNG, 9 KiB | batches, no worker | 90 (80 to 95) |",
        "| A CPU | mine | 64x48 PNG, 9 KiB | batches, 2 workers | 90 (80 to 95), 171 by the clock on 2 |",
    ]
    assert annotations.splitlines()[2:] == [
        "| A CPU | 1,200 images, 4,500 objects, 2 MB | again | 7.0 s | 9.0 s | 600 MiB |"
    ]
    assert data_loading.table([index]) == annotations and data_loading.table([]) == ""
