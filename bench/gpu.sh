#!/usr/bin/env bash
# Everything that needs a GPU, in order of value; a part that fails or runs out of time does not stop
# the next, and a benchmark that is interrupted leaves what it has measured. Without a GPU each part
# says why it is skipped and only starts up.
# Usage: [PYTHON=python3] [RESULTS=bench/results/gpu] [SECONDS_IN_ALL=570] bash bench/gpu.sh [PART…]
# What does not fit into SECONDS_IN_ALL is skipped, by name; Ctrl-C skips what is behind the part that
# runs, which `timeout` keeps from the terminal. Named parts run alone, in the order of
# PARTS, and leave what other calls found in RESULTS.
# Leaves PART.txt (output), PART.err, of parts that end with a line of JSON PART.json, and of those
# that fail PART.failed; summary.json holds every line of JSON by part, and all.tar.gz every file,
# so that one is all there is to copy: both are written again after each part.
set -u
cd "$(dirname "$0")/.."
PARTS=(
  cuda doctor test_device test_kernels latency-janus rollout-janus-256 train-pmtp-janus
  rollout-janus-256-guided kernels train-djo-janus train-cycle-rl-janus test_train rollout-janus
  test_device_overlap overlap-latency-janus fused-rollout-janus jacobi-tiny window-janus
  test_device_serving
  latency-tiny latency-100m rollout-tiny train-pmtp-small train-djo-small train-cycle-rl-small
  cycle profile_generate profile_cycle kernels-compile roofline test_engine tune
)
for name in "$@"; do
  case " ${PARTS[*]} " in
    *" $name "*) ;;
    *)
      echo "no part $name; choose ${PARTS[*]}"
      exit 2
      ;;
  esac
done
asked=" ${*:-${PARTS[*]}} "
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-570}
if ! why=$("$PYTHON" -c 'import echogen.cli, echogen.train.stages.cycle_rl' 2>&1); then
  echo "$PYTHON cannot run echogen (${why##*$'\n'}): run make gpu, or name another PYTHON"
  exit 1
fi
GPU=yes
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || GPU=no
[ "$GPU" = yes ] || echo "no GPU that torch sees: every part is started up and skipped"
if [ "$GPU" = yes ]; then RESULTS=${RESULTS:-bench/results/gpu}; else RESULTS=${RESULTS:-build/gpu-dry-run}; fi
mkdir -p "$RESULTS"
unset TRITON_INTERPRET ECHOGEN_FORCE_REFERENCE
export PYTHONUNBUFFERED=1 # so that a part that is killed leaves what it had said

summarise() {
  "$PYTHON" - "$RESULTS" << 'END'
import json, sys, tarfile
from pathlib import Path

folder, parts = Path(sys.argv[1]), {}
for path in sorted(folder.glob("*.json")):
    if path.name != "summary.json":
        try:
            parts[path.stem] = json.loads(path.read_text())
        except ValueError as error:
            parts[path.stem] = {"error": f"not JSON: {error}"}
parts["failed"] = sorted(path.stem for path in folder.glob("*.failed"))
(folder / "summary.json").write_text(json.dumps(parts))
new, packed = folder / "new.tar.gz", folder / "all.tar.gz"
with tarfile.open(new, "w:gz", compresslevel=1) as archive:
    for path in sorted(folder.iterdir()):
        if path not in (new, packed):
            archive.add(path, path.name)
new.replace(packed)
END
}

# part NAME MOST_SECONDS COMMAND…: a part that hangs is ended, and so is one out of time; it is
# interrupted first, on which benchmarks of operators, the engine and training print what they have.
part() {
  local name=$1 most=$2 left=$((SECONDS_IN_ALL - SECONDS)) code
  shift 2
  if [ "$left" -lt 5 ]; then
    echo "== $name: skipped, $SECONDS_IN_ALL s are over"
    touch "$RESULTS/$name.failed"
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
    touch "$RESULTS/$name.failed"
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
    touch "$RESULTS/$name.failed"
  fi
}

# tests NAME SECONDS [NAME=VALUE…] -- WHAT…: tests, a thread each.
tests() {
  local name=$1 most=$2 settings=()
  shift 2
  while [ "$1" != -- ]; do settings+=("$1"); shift; done
  shift
  # Twice -v for the names, as one -v only undoes the -q of pyproject.toml; and the stack of a test
  # that hangs, before its part is ended.
  gpu "$name" "$most" env OMP_NUM_THREADS=1 "${settings[@]}" "$PYTHON" -m pytest -vv --tb=short \
    -o faulthandler_timeout=40 -p no:cacheprovider "$@"
}

engine() { # NAME SECONDS ARGUMENTS…, of the environment's switches
  local name=$1 most=$2
  shift 2
  gpu "$name" "$most" "$PYTHON" -m echogen bench engine --device cuda --dtype bfloat16 --json "$@"
}

training() { # NAME SECONDS ARGUMENTS…
  local name=$1 most=$2
  shift 2
  gpu "$name" "$most" "$PYTHON" -m echogen bench train --device cuda --json "$@"
}

profile() { # NAME SECONDS WHAT ARGUMENTS…
  local name=$1 most=$2 what=$3
  shift 3
  gpu "$name" "$most" "$PYTHON" -m echogen profile "$what" --tool torch --device cuda \
    --dtype bfloat16 --out "$RESULTS/$name" --json "$@"
}

cuda() { # the operators in CUDA C++, for this GPU or for all that are supported
  local arch
  if ! command -v nvcc > /dev/null || ! command -v cmake > /dev/null; then
    echo "== cuda: skipped, nvcc or cmake is missing; CuPy compiles at first use"
    return
  fi
  arch=$([ "$GPU" = yes ] && "$PYTHON" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + "a" * (major == 9))' || echo "80;90a;100")
  part cuda 120 bash -c "cmake -S . -B build/cuda '-DECHOGEN_CUDA_ARCHITECTURES=$arch' && cmake --build build/cuda --parallel"
}

# Each file in a process of its own, as an illegal access ends every later test of its process; and
# without the tests that run the CUDA C++ on a CPU.
test_kernels() {
  local file files=(tests/kernels/test_*.py) lanes=$(($(nproc) > 3 ? $(nproc) - 2 : 1))
  [ "$GPU" = yes ] || files=(tests/kernels)
  for file in "${files[@]}"; do
    tests "test_kernels.$(basename "$file" .py)" 150 -- -k "not emulated" "$file" &
    while [ "$(jobs -rp | wc -l)" -ge "$lanes" ]; do wait -n; done
  done
  wait
}

run() { # NAME
  local janus="--model janus_pro_1b"
  case $1 in
    # After `cuda`, whose code it would compile, and without the C++ for CPUs.
    doctor) part doctor 60 env ECHOGEN_NATIVE=0 "$PYTHON" -m echogen doctor --json ;;
    cuda) cuda ;;
    # A step of drawing in a graph and without: the figures of drawing depend on it. Only the tests
    # that need a GPU, which are the last of their files: what runs on a CPU ran on one.
    test_device)
      tests "$1" 90 -- -k "gpu or graphs" tests/engine/test_device.py \
        tests/engine/test_device_windows.py
      ;;
    test_device_serving)
      tests "$1" 90 -- -k "graphs or few_steps_ahead" tests/engine/test_device_serving.py
      ;;
    test_train) tests "$1" 120 -- -k a_gpus_blocks tests/train/test_packing.py ;;
    latency-janus) engine "$1" 150 --mode latency $janus --repeats 3 ;;
    rollout-janus-256) engine "$1" 120 --mode rollout $janus --batch 256 --cfg 1 --repeats 2 ;;
    rollout-janus-256-guided)
      engine "$1" 200 --mode rollout $janus --batch 256 --cfg 5 --repeats 2
      ;;
    test_kernels) test_kernels ;;
    # All operators beside eager torch and their peers; torch.compile, which takes far longer to
    # compile than all else to run, is a part of its own.
    kernels)
      gpu "$1" 150 "$PYTHON" -m echogen bench kernels --device cuda --provider eager \
        --provider torch --provider torchvision --provider liger --provider trl \
        --provider flash-attn --json
      ;;
    rollout-janus) engine "$1" 150 --mode rollout $janus --batch 64 --repeats 2 ;;
    train-*-janus)
      training "$1" 180 --stage "$(stage "$1")" --recipe janus_pro_1b --repeats 3
      ;;
    # The same steps with launches that overlap.
    test_device_overlap)
      tests "$1" 90 ECHOGEN_PDL=1 -- -k "gpu or graphs" tests/engine/test_device.py
      ;;
    overlap-latency-janus)
      ECHOGEN_PDL=1 engine "$1" 60 --mode latency $janus --repeats 3 --peer none
      ;;
    fused-rollout-janus)
      ECHOGEN_FUSED=1 engine "$1" 60 --mode rollout $janus --batch 64 --repeats 2 --peer none
      ;;
    window-janus) engine "$1" 60 --mode window $janus ;;
    jacobi-tiny) # what a trained model's drafts gain: the same codes, in fewer steps
      engine "$1" 60 --mode jacobi --model tiny --layouts 40 --window 8 --window 16 --temperature 1
      ;;
    latency-tiny) engine "$1" 60 --mode latency --model tiny ;;
    latency-100m) engine "$1" 60 --mode latency --model random:100m ;;
    rollout-tiny) engine "$1" 60 --mode rollout --model tiny ;;
    train-*-small) training "$1" 60 --stage "$(stage "$1")" --recipe small ;;
    cycle)
      gpu "$1" 60 "$PYTHON" -m echogen cycle --layout examples/overlap.json \
        --out "$RESULTS/cycle" --device cuda --json
      ;;
    profile_generate) profile "$1" 60 generate --model random --recipe janus_pro_1b --batch 1 ;;
    profile_cycle) profile "$1" 60 cycle ;;
    kernels-compile)
      gpu "$1" 120 "$PYTHON" -m echogen bench kernels --device cuda --provider compile \
        --operator linear_logprob --operator gumbel_st_embed --operator rms_norm \
        --operator swiglu --operator rope --json
      ;;
    roofline)
      gpu "$1" 60 "$PYTHON" -m echogen bench roofline --device cuda --dtype bfloat16 \
        --out "$RESULTS/roofline" --json
      ;;
    test_engine) # over HTTP nothing of a GPU is new
      tests "$1" 240 -- --ignore tests/engine/test_http.py --ignore tests/engine/test_http_load.py \
        tests/engine
      ;;
    tune) # what the operators' launch constants should be
      gpu "$1" 500 "$PYTHON" -m echogen bench kernels --tune --device cuda --json
      ;;
    *) echo "part $1 has a name and no command" && touch "$RESULTS/$1.failed" ;;
  esac
}

stage() { # PART, as train-STAGE-RECIPE
  local rest=${1#train-}
  echo "${rest%-*}"
}

failed=() stopped=
trap 'stopped=yes' INT
for name in "${PARTS[@]}"; do
  case $asked in *" $name "*) ;; *) continue ;; esac
  if [ -n "$stopped" ]; then
    echo "stopped before $name; what was measured is in $RESULTS"
    exit 130
  fi
  rm -f "$RESULTS/$name".*
  run "$name"
  summarise
  for mark in "$RESULTS/$name.failed" "$RESULTS/$name".*.failed; do
    [ ! -e "$mark" ] || failed+=("$(basename "$mark" .failed)")
  done
done
if [ "${#failed[@]}" -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "everything is in $RESULTS"
