#!/usr/bin/env bash
# What only a GPU can show, in one run of at most 9 minutes:  benchmarks/gpu_check.sh OUT
#
#   benchmarks/gpu_check.sh OUT again [SUMMARY]   3 minutes: what failed in the run of that summary.txt, else a profile
#   benchmarks/gpu_check.sh OUT rehearse          the same plan on a CPU, with tiny cases
#
# Needs a CUDA device and a python3 (or PYTHON=...) with torch and triton; no network. It takes jdkd/_C.so, built with
# any Python, if it is of the sources here, else compiles it in place. OUT gets at most 8 files, each written as results
# are made: summary.txt says what failed. The exit code is 1 if anything did, 2 if nothing could be begun.
set -uo pipefail

PYTHON=${PYTHON:-python3}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
command -v "$PYTHON" >/dev/null || {
  echo "gpu_check: there is no $PYTHON; set PYTHON" >&2
  exit 2
}
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m benchmarks.gpu "$@"
