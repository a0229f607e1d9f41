"""Benchmarks: ``python -m benchmarks.run`` for the kernels, ``python -m benchmarks.latency`` for detectors, and on a
machine with a GPU ``benchmarks/gpu_check.sh OUT`` for all that only a GPU can show."""
