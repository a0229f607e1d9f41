"""The GPU check: ``benchmarks/gpu_check.sh OUT``, what only a GPU can show, in one run of at most 9 minutes.

:mod:`benchmarks.gpu.plan` says what is run, in which order and for how long; :mod:`benchmarks.gpu.check` runs it, each
part in processes of its own under its deadline, and imports nothing but Python itself: whatever breaks in a part, the
next one begins. Parts: :mod:`machine <benchmarks.gpu.machine>`, :mod:`smoke <benchmarks.gpu.smoke>`, the tests under
:mod:`reports <benchmarks.gpu.reports>` beside the sanitizers, and :mod:`timed <benchmarks.gpu.timed>`, the one process
of all benchmarks; in a second run :mod:`profiled <benchmarks.gpu.profiled>`.
"""
