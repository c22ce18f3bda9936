#!/usr/bin/env bash
# Everything that needs a GPU, in order of value, in less than ten minutes; a part that fails or
# runs out of time does not stop the next, and a benchmark that is interrupted leaves what it has
# measured. Without a GPU each part says why it is skipped and only starts up.
# Usage: [PYTHON=python3] [RESULTS=bench/results/gpu] [SECONDS_IN_ALL=570] bash bench/gpu.sh
# Leaves PART.txt (output), PART.err and, of parts that end with a line of JSON, PART.json;
# summary.json holds every line of JSON by part, written anew after each.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-570}
if ! why=$("$PYTHON" -c 'import echogen.cli, echogen.train.stages.cycle_rl' 2>&1); then
  echo "$PYTHON cannot run echogen (${why##*$'\n'}): make .venv, or name another PYTHON"
  exit 1
fi
GPU=yes
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || GPU=no
[ "$GPU" = yes ] || echo "no GPU that torch sees: every part is started up and skipped"
if [ "$GPU" = yes ]; then RESULTS=${RESULTS:-bench/results/gpu}; else RESULTS=${RESULTS:-build/gpu-dry-run}; fi
mkdir -p "$RESULTS"
rm -f "$RESULTS"/*.json "$RESULTS"/*.txt "$RESULTS"/*.err "$RESULTS"/failed
unset TRITON_INTERPRET ECHOGEN_FORCE_REFERENCE
export PYTHONUNBUFFERED=1 # so that a part that is killed leaves what it had said

summarise() {
  "$PYTHON" - "$RESULTS" << 'END'
import json, sys
from pathlib import Path

folder, parts = Path(sys.argv[1]), {}
for path in sorted(folder.glob("*.json")):
    if path.name != "summary.json":
        try:
            parts[path.stem] = json.loads(path.read_text())
        except ValueError as error:
            parts[path.stem] = {"error": f"not JSON: {error}"}
failed = folder / "failed"
parts["failed"] = failed.read_text().split() if failed.exists() else []
(folder / "summary.json").write_text(json.dumps(parts))
END
}

# part NAME MOST_SECONDS COMMAND…: a part that hangs is ended, and so is one out of time; it is
# interrupted first, on which benchmarks print what they have.
part() {
  local name=$1 most=$2 left=$((SECONDS_IN_ALL - SECONDS)) code
  shift 2
  if [ "$left" -lt 5 ]; then
    echo "== $name: skipped, $SECONDS_IN_ALL s are over"
    echo "$name" >> "$RESULTS/failed"
    return
  fi
  echo "== $name ($SECONDS s)"
  timeout --signal=INT --kill-after=15 "$((left < most ? left : most))" "$@" \
    > "$RESULTS/$name.txt" 2> "$RESULTS/$name.err"
  code=$?
  # A benchmark that refused a result exits with 1, yet the others' times are worth keeping.
  tail -n 1 "$RESULTS/$name.txt" | grep '^{' > "$RESULTS/$name.json" || rm -f "$RESULTS/$name.json"
  if [ "$code" -ne 0 ]; then
    echo "$name failed ($code): see $RESULTS/$name.err and $RESULTS/$name.txt"
    echo "$name" >> "$RESULTS/failed"
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
  if ! timeout 120 "$@" > "$RESULTS/$name.txt" 2> "$RESULTS/$name.err"; then
    echo "$name does not start: see $RESULTS/$name.err and $RESULTS/$name.txt"
    echo "$name" >> "$RESULTS/failed"
  fi
}

# tests NAME SECONDS [NAME=VALUE…] -- WHAT…: tests, a thread each.
tests() {
  local name=$1 most=$2 settings=()
  shift 2
  while [ "$1" != -- ]; do settings+=("$1"); shift; done
  shift
  gpu "$name" "$most" env OMP_NUM_THREADS=1 "${settings[@]}" "$PYTHON" -m pytest -v --tb=short \
    -p no:cacheprovider "$@"
}

part doctor 60 "$PYTHON" -m echogen doctor --json
if command -v nvcc > /dev/null && command -v cmake > /dev/null; then
  arch=$([ "$GPU" = yes ] && "$PYTHON" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + "a" * (major == 9))' || echo "80;90a;100")
  part cuda 120 bash -c "cmake -S . -B build/cuda '-DECHOGEN_CUDA_ARCHITECTURES=$arch' && cmake --build build/cuda --parallel"
else
  echo "== cuda: skipped, nvcc or cmake is missing; CuPy compiles at first use"
fi
# Each file in a process of its own, as an illegal access ends every later test of its process; and
# without the tests that run the CUDA C++ on a CPU.
lanes=$(($(nproc) > 3 ? $(nproc) - 2 : 1))
if [ "$GPU" = yes ]; then files=(tests/kernels/test_*.py); else files=(tests/kernels); fi
for file in "${files[@]}"; do
  tests "$(basename "$file" .py)" 150 -- -k "not emulated" "$file" &
  while [ "$(jobs -rp | wc -l)" -ge "$lanes" ]; do wait -n; done
done
wait
# A step of drawing in a graph and without, and the same with launches that overlap.
tests test_device 90 -- tests/engine/test_device.py &
tests test_device_overlap 90 ECHOGEN_PDL=1 -- tests/engine/test_device.py &
wait
summarise
# All operators beside eager torch and their peers; torch.compile, which takes far longer to compile
# than all else to run, comes last.
gpu kernels 150 "$PYTHON" -m echogen bench kernels --device cuda --provider eager \
  --provider torch --provider torchvision --provider liger --provider trl \
  --provider flash-attn --json
engine() { # NAME SECONDS ARGUMENTS…, of the environment's switches
  local name=$1 most=$2
  shift 2
  gpu "$name" "$most" "$PYTHON" -m echogen bench engine --device cuda --dtype bfloat16 --json "$@"
}
engine latency-janus 120 --mode latency --model janus_pro_1b --repeats 3
engine rollout-janus 100 --mode rollout --model janus_pro_1b --batch 64 --repeats 2
engine rollout-janus-256 60 --mode rollout --model janus_pro_1b --batch 256 --repeats 2 --peer none
summarise
training() { # NAME SECONDS ARGUMENTS…
  local name=$1 most=$2
  shift 2
  gpu "$name" "$most" "$PYTHON" -m echogen bench train --device cuda --json "$@"
}
for stage in pmtp djo cycle-rl; do
  training "train-$stage-janus" 90 --stage "$stage" --recipe janus_pro_1b --repeats 3
done
export ECHOGEN_PDL=1
engine overlap-latency-janus 60 --mode latency --model janus_pro_1b --repeats 3 --peer none
unset ECHOGEN_PDL
export ECHOGEN_FUSED=1
engine fused-rollout-janus 60 --mode rollout --model janus_pro_1b --batch 64 --repeats 2 --peer none
unset ECHOGEN_FUSED
engine window-janus 60 --mode window --model janus_pro_1b
engine latency-tiny 60 --mode latency --model tiny
engine latency-100m 60 --mode latency --model random:100m
engine rollout-tiny 60 --mode rollout --model tiny
for stage in pmtp djo cycle-rl; do training "train-$stage-small" 60 --stage "$stage" --recipe small; done
gpu cycle 60 "$PYTHON" -m echogen cycle --layout examples/overlap.json --out "$RESULTS/cycle" \
  --device cuda --json
profile() { # NAME SECONDS WHAT ARGUMENTS…
  local name=$1 most=$2 what=$3
  shift 3
  gpu "$name" "$most" "$PYTHON" -m echogen profile "$what" --tool torch --device cuda \
    --dtype bfloat16 --out "$RESULTS/$name" --json "$@"
}
profile profile_generate 60 generate --model random --recipe janus_pro_1b --batch 1
profile profile_cycle 60 cycle
summarise
gpu kernels-compile 120 "$PYTHON" -m echogen bench kernels --device cuda --provider compile \
  --operator linear_logprob --operator gumbel_st_embed --operator rms_norm --operator swiglu \
  --operator rope --json
gpu roofline 60 "$PYTHON" -m echogen bench roofline --device cuda \
  --dtype bfloat16 --out "$RESULTS/roofline" --json
tests test_engine 240 -- --ignore tests/engine/test_http.py \
  --ignore tests/engine/test_http_load.py tests/engine # over HTTP nothing of a GPU is new
summarise
if [ -e "$RESULTS/failed" ]; then
  echo "failed: $(tr '\n' ' ' < "$RESULTS/failed")"
  exit 1
fi
echo "everything is in $RESULTS"
