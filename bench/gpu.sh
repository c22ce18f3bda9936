#!/usr/bin/env bash
# Everything that needs a GPU, in order of value, in less than ten minutes; a part that fails does
# not stop the next. Without a GPU each part says why it is skipped and only starts up.
# Usage: [PYTHON=python3] [OUT=bench/results/gpu] [SECONDS_IN_ALL=570] bash bench/gpu.sh
# Leaves PART.txt (output), PART.err and, of parts that end with a line of JSON, PART.json, beside
# CSV and PNG; summary.json holds every line of JSON by part.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-570}
if ! "$PYTHON" -c 'import torch' 2> /dev/null; then
  echo "$PYTHON has no torch: nothing was run"
  exit 1
fi
GPU=yes
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || GPU=no
[ "$GPU" = yes ] || echo "no GPU that torch sees: every part is started up and skipped"
if [ "$GPU" = yes ]; then OUT=${OUT:-bench/results/gpu}; else OUT=${OUT:-build/gpu-dry-run}; fi
mkdir -p "$OUT"
rm -f "$OUT"/*.json "$OUT"/*.txt "$OUT"/*.err "$OUT"/failed
unset TRITON_INTERPRET ECHOGEN_FORCE_REFERENCE

# part NAME MOST_SECONDS COMMAND…: a part that hangs is ended, and so is one out of time.
part() {
  local name=$1 most=$2 left=$((SECONDS_IN_ALL - SECONDS)) code
  shift 2
  if [ "$left" -lt 5 ]; then
    echo "== $name: skipped, $SECONDS_IN_ALL s are over"
    echo "$name" >> "$OUT/failed"
    return
  fi
  echo "== $name"
  timeout "$((left < most ? left : most))" "$@" > "$OUT/$name.txt" 2> "$OUT/$name.err"
  code=$?
  # A benchmark that refused a result exits with 1, yet the others' times are worth keeping.
  tail -n 1 "$OUT/$name.txt" | grep '^{' > "$OUT/$name.json" || rm -f "$OUT/$name.json"
  if [ "$code" -ne 0 ]; then
    echo "$name failed ($code): see $OUT/$name.err and $OUT/$name.txt"
    echo "$name" >> "$OUT/failed"
  fi
}

# gpu NAME MOST_SECONDS COMMAND…: a part that needs the GPU; without one its program starts up all
# the same: a command prints its help, pytest collects.
gpu() {
  local name=$1 words=0 word
  if [ "$GPU" = yes ]; then
    part "$@"
    return
  fi
  shift 2
  for word in "$@"; do
    case $word in --*) break ;; esac
    words=$((words + 1))
  done
  case " $* " in
    *" pytest "*) set -- "$@" --collect-only ;;
    *) set -- "${@:1:$words}" --help ;;
  esac
  echo "== $name: skipped, no GPU; starts up"
  if ! timeout 120 "$@" > "$OUT/$name.txt" 2> "$OUT/$name.err"; then
    echo "$name does not start: see $OUT/$name.err and $OUT/$name.txt"
    echo "$name" >> "$OUT/failed"
  fi
}

part doctor 60 "$PYTHON" -m echogen doctor --json
if command -v nvcc > /dev/null && command -v cmake > /dev/null; then
  part cuda 120 bash -c 'cmake -S . -B build/cuda && cmake --build build/cuda'
else
  echo "== cuda: skipped, nvcc or cmake is missing; CuPy compiles at first use"
fi
# Each file in a process of its own, four at a time: an illegal access ends every later test of
# its process.
if [ "$GPU" = yes ]; then files=(tests/kernels/test_*.py); else files=(tests/kernels); fi
for file in "${files[@]}"; do
  gpu "$(basename "$file" .py)" 240 "$PYTHON" -m pytest "$file" &
  while [ "$(jobs -rp | wc -l)" -ge 4 ]; do wait -n; done
done
wait
# A step of drawing in a graph and without, then the same with launches that overlap.
gpu test_device 150 "$PYTHON" -m pytest tests/engine/test_device.py
gpu test_device_overlap 150 env ECHOGEN_PDL=1 "$PYTHON" -m pytest tests/engine/test_device.py
for mode in latency rollout; do
  gpu "$mode" 150 "$PYTHON" -m echogen bench engine --mode "$mode" --device cuda --dtype bfloat16 --json
done
gpu rollout_fused 150 env ECHOGEN_FUSED=1 "$PYTHON" -m echogen bench engine --mode rollout \
  --device cuda --dtype bfloat16 --json
gpu latency_overlap 150 env ECHOGEN_PDL=1 "$PYTHON" -m echogen bench engine --mode latency \
  --device cuda --dtype bfloat16 --json
for operator in $("$PYTHON" -c '
from echogen.bench.registry import cases
print(*dict.fromkeys(c.operator for c in cases().values()))'); do
  gpu "kernels_$operator" 120 "$PYTHON" -m echogen bench kernels --device cuda \
    --operator "$operator" --out "$OUT/kernels_$operator" --json
  [ "$GPU" = yes ] || break # one start-up speaks for all
done
gpu roofline 120 "$PYTHON" -m echogen bench roofline --device cuda --out "$OUT/roofline" --json
gpu cycle 120 "$PYTHON" -m echogen cycle --layout examples/overlap.json --out "$OUT/cycle" \
  --device cuda --json
for model in tiny random:100m; do
  gpu "engine_${model//:/_}" 120 "$PYTHON" -m echogen bench engine --model "$model" --device cuda --json
done
for stage in pmtp djo cycle-rl; do
  gpu "train_$stage" 90 "$PYTHON" -m echogen bench train --stage "$stage" --device cuda --json
done
for what in generate cycle; do
  gpu "profile_$what" 60 "$PYTHON" -m echogen profile "$what" --tool torch --device cuda \
    --out "$OUT/profile" --json
done
gpu test_engine 240 "$PYTHON" -m pytest tests/engine
# The kernels that this GPU's own compiler makes, beside those compiled ahead of time elsewhere.
arch=$([ "$GPU" = yes ] && "$PYTHON" -c 'import torch; print("sm_%d%d" % torch.cuda.get_device_capability())' || echo sm_90)
gpu compile 120 "$PYTHON" -m echogen bench compile --arch "$arch" --json
"$PYTHON" - "$OUT" << 'END'
import json, sys
from pathlib import Path

folder = Path(sys.argv[1])
parts = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
failed = folder / "failed"
parts["failed"] = failed.read_text().split() if failed.exists() else []
(folder / "summary.json").write_text(json.dumps(parts))
END
if [ -e "$OUT/failed" ]; then
  echo "failed: $(tr '\n' ' ' < "$OUT/failed")"
  exit 1
fi
echo "everything is in $OUT"
