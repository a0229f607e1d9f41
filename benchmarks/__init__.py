"""Benchmarks: ``python -m benchmarks.run`` for the kernels, ``python -m benchmarks.latency`` for
detectors."""
