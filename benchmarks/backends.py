"""What is known of each kernel: what of it is checked, how it is tested without a GPU, where it was measured and tuned.
See :func:`table`."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import markdown, record
from jdkd import _backend
from jdkd.env import load_operators
from jdkd.ops import elastic_kernels, pearson_forms

ROOT = Path(__file__).resolve().parents[1]
TESTS = {  # files below tests/, by operator and kernel
    ("elastic_conv", "triton"): ("ops/test_elastic_conv_triton", "ops/test_elastic_conv_aot"),
    ("elastic_pointwise", "triton"): ("ops/test_elastic_pointwise_triton", "ops/test_elastic_pointwise_aot"),
    ("elastic_levels", "triton"): ("ops/test_elastic_levels_triton", "ops/test_elastic_levels_aot"),
    ("pack", "cuda"): ("ops/test_pack_emulated", "ops/test_pack_aot"),
    ("pack", "triton"): ("ops/test_pack_property", "ops/test_pack_aot"),
    ("pearson_single", "cuda"): ("ops/test_pearson_single_emulated", "ops/test_pearson_single_aot"),
    ("pearson", "triton"): ("ops/test_pearson_triton", "test_aot"),
    ("pearson", "cuda"): ("ops/test_pearson_split_emulated", "test_aot"),
}
HOW = {
    "_emulated": "its source on the host, thread by thread",
    "aot": "its machine code for sm_90",
    "": "Triton's interpreter",
}
ELASTIC = elastic_kernels.NAME
# Of benchmarks.tuned; others are called as operators.
TABLES = {"elastic_conv": ELASTIC, "elastic_pointwise": ELASTIC, "pearson_single": pearson_forms.NAME}
HEAD = ("operator", "kernel", "checked before use", "dtypes", "its place", "tested without a GPU by")
HEAD += ("measured on", "tuned on")


def table() -> str:
    """A row for each operator and kernel, of what is registered, of the files of the tests, and of the result files."""
    load_operators()
    kernels = [(op, kernel) for op in sorted(_backend.ops()) for kernel in _backend.available(op)]
    rows = [_row(op, kernel) for op, kernel in kernels if kernel != "reference"]
    return markdown.table(HEAD, "l", rows)


def _row(op: str, kernel: str) -> list[str]:
    subjects = _backend.subjects(op, kernel, torch.device("cpu"))
    forms = dict.fromkeys(subject.form for subject in subjects)
    dtypes = dict.fromkeys(str(subject.dtype).removeprefix("torch.") for subject in subjects)
    return [
        f"`{op}`",
        kernel,
        ", ".join(forms) or "nothing, so it never runs unasked",
        ", ".join(dtypes),
        _backend.explain(op)[kernel] or "in this order, where it was seen right",
        ", ".join(_tests(op, kernel)),
        _measured(op, kernel) or "not measured",
        _tuned(op, kernel) or "not tuned",
    ]


def _tests(op: str, kernel: str) -> list[str]:
    """What runs of a kernel where there is no GPU."""
    if kernel == "cpu":
        return ["running it"]
    files = TESTS[op, kernel]
    if missing := [file for file in files if not (ROOT / "tests" / f"{file}.py").exists()]:
        raise ValueError(f"{op} / {kernel} is said to be tested by {missing}, which is not there")
    return [next(how for suffix, how in HOW.items() if file.endswith(suffix)) for file in files]


def _measured(op: str, kernel: str) -> str:
    """Where rows of an operator were made that this kernel was in: those of GPUs say a version of CUDA."""
    devices = {}
    for row in record.load(sorted(record.RESULTS.glob(f"*/{op}.jsonl"))):
        ours, *how = row["provider"].split()
        another = {*how} & {*_backend.BACKENDS} - {kernel}
        if ours == record.OURS and not another and _on_its_device(row, kernel):
            devices[row["device"]] = None
    return ", ".join(devices)


def _tuned(op: str, kernel: str) -> str:
    """Where `jdkd tune` timed the ways of an operator on this kernel's device, and how many regions it changed."""
    regions: dict[str, dict[str, bool]] = {}
    for row in record.load(sorted(record.RESULTS.glob("*/tuned.jsonl"))):
        if row["table"] == TABLES.get(op, op) and "measured" in row and _on_its_device(row, kernel):
            regions.setdefault(row["device"], {})[row["region"]] = row["path"] != row["default"]
    told = ((device, len(found), sum(found.values())) for device, found in regions.items())
    return ", ".join(f"{device}: {changed} of {count} regions changed" for device, count, changed in told)


def _on_its_device(row: record.Row, kernel: str) -> bool:
    return (row.get("cuda") is None) == (kernel == "cpu")
