#!/usr/bin/env bash
# What only a GPU can show, in two parts of at most 9 minutes each:  benchmarks/gpu_check.sh OUT [tests|benchmarks|all]
#
# Needs a CUDA device, a CUDA toolkit, and a python3 (or PYTHON=...) with torch, triton and pytest; no network. It
# compiles jdkd._C in place for this device. The tests are `pytest -m gpu`, and those of small shapes again under
# compute-sanitizer where that is found; the benchmarks are the kernel cases and the latency table. It leaves in OUT:
# summary.txt, steps.jsonl, log.txt, and of its part junit.xml, or kernels.jsonl and latency.jsonl.
# A step that fails or runs out of time does not stop the next; the exit code is 1 if any did, 2 if none could start.
set -uo pipefail

LIMIT=540 # seconds for the steps of a part together, the build included

refuse() {
  echo "gpu_check: $1" >&2
  exit 2
}

[[ $# -eq 1 || $# -eq 2 ]] || refuse "give one folder for the results: benchmarks/gpu_check.sh OUT [PART]"
PART=${2:-all}
case $PART in
  tests | benchmarks) ;;
  all) LIMIT=$((2 * LIMIT)) ;;
  *) refuse "there is no part $PART; choose tests, benchmarks or all" ;;
esac
PYTHON=${PYTHON:-python3}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
[[ ! -e $1 || -d $1 ]] || refuse "$1 is a file; give a folder"
[[ -z $(ls -A "$1" 2>/dev/null) ]] || refuse "$1 is not empty; give a new folder, so that no result is overwritten"
command -v "$PYTHON" >/dev/null || refuse "there is no $PYTHON; set PYTHON"
capability=$("$PYTHON" - <<'PY'
import sys

try:
    import torch
except ImportError:
    sys.exit("torch is not installed for this python")
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no CUDA device")
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if major == 9 else ""))
PY
) || refuse "this check runs on a machine with an NVIDIA GPU; nothing was run"

mkdir -p "$1" || refuse "$1 cannot be made"
OUT=$(cd "$1" && pwd)
cd "$ROOT" || exit 2
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$capability}" JDKD_BUILD_EXT=1
unset TRITON_INTERPRET JDKD_BACKEND
LOG=$OUT/log.txt
SUMMARY=$OUT/summary.txt
failed=0

# step NAME SECONDS COMMAND...: everything it prints goes to the log, standard output to the summary too.
step() {
  local name=$1 limit=$2 started=$SECONDS rc taken
  shift 2
  ((limit > LIMIT - SECONDS)) && limit=$((LIMIT - SECONDS))
  printf '\n== %s: %s\n' "$name" "$*" | tee -a "$LOG" "$SUMMARY"
  if ((limit < 5)); then
    rc=124
    echo "no time is left for it" | tee -a "$LOG" "$SUMMARY"
  else
    timeout --kill-after=10 "$limit" "$@" 2> >(tee -a "$LOG" >&2) | tee -a "$LOG" | tail -n 60 | cut -c1-200 |
      tee -a "$SUMMARY"
    rc=${PIPESTATUS[0]}
  fi
  taken=$((SECONDS - started))
  ((rc == 0)) || failed=1
  printf '{"step": "%s", "rc": %d, "timed_out": %s, "seconds": %d, "limit": %d}\n' \
    "$name" "$rc" "$( ((rc == 124 || rc == 137)) && echo true || echo false)" "$taken" "$limit" >>"$OUT/steps.jsonl"
  echo "-- $name: exit code $rc after $taken s" | tee -a "$LOG" "$SUMMARY"
}

# find_tests: fills gpu_tests with the files that have GPU tests, less those that need a package which is not here.
find_tests() {
  local -a files
  local -A missing=()
  local file package
  mapfile -t files < <(grep -rlE 'mark\.gpu|^OP = ' tests --include='test_*.py' | sort)
  while read -r file package; do
    missing[$file]=$package
  done < <(timeout 60 "$PYTHON" -m pytest --collect-only -q -m gpu --continue-on-collection-errors -W default \
    -p no:cacheprovider "${files[@]}" 2>&1 </dev/null |
    awk -F"'" '/ ERROR collecting / { split($0, words, " "); file = words[4] }
               /No module named/ && $2 !~ /^jdkd/ { print file, $2 }')
  gpu_tests=()
  for file in "${files[@]}"; do
    if [[ -n ${missing[$file]:-} ]]; then
      echo "left out: $file, there is no module ${missing[$file]}" | tee -a "$LOG" "$SUMMARY"
    else
      gpu_tests+=("$file")
    fi
  done
}

# run_tests NAME SECONDS FILES...: their GPU tests, under the words of `under`; a report of its own.
run_tests() {
  local name=$1 seconds=$2
  shift 2
  step "$name" "$seconds" "${under[@]}" "$PYTHON" -m pytest -m gpu -q --continue-on-collection-errors \
    -p no:cacheprovider -W default --junitxml "$OUT/junit${under:+_$name}.xml" "$@"
}

# bench OP SECONDS LAST EACH: cases of one operator, EACH seconds of rounds a case; none begins after LAST seconds.
bench() {
  step "$1" "$2" "$PYTHON" -m benchmarks.run "$1" --seconds "$4" --limit "$3" --out "$OUT/kernels.jsonl"
}

step build 150 "$PYTHON" setup.py --quiet build_ext --inplace
if [[ $PART != benchmarks ]]; then
  step env 30 "$PYTHON" -m jdkd.env
  find_tests # at most 60 seconds
  under=()
  run_tests tests 210 "${gpu_tests[@]}"
  PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
  if command -v compute-sanitizer >/dev/null; then
    under=(compute-sanitizer --tool memcheck --error-exitcode 3)
    run_tests sanitizer 90 tests/ops/test_{pack,elastic_conv,elastic_levels,elastic_pointwise}.py
  else
    echo "sanitizer: not run, there is no compute-sanitizer" | tee -a "$LOG" "$SUMMARY"
  fi
fi
if [[ $PART != tests ]]; then
  bench elastic_conv 110 85 0.4
  bench elastic_levels 20 10 0.4
  bench supernet_step 50 20 3
  bench subnet_change 50 20 1
  bench pack 25 15 0.4
  bench elastic_pointwise 30 20 0.4
  bench pearson 60 40 0.8
  step latency 45 "$PYTHON" -m benchmarks.latency --seconds 10 --out "$OUT/latency.jsonl"
fi

printf '\n== steps (commit %s, %s s)\n' "$(git rev-parse --short HEAD 2>/dev/null || echo unknown)" "$SECONDS" |
  tee -a "$SUMMARY"
tee -a "$SUMMARY" <"$OUT/steps.jsonl"
exit "$failed"
