#!/usr/bin/env bash
# Everything that needs a GPU, in order of value; a part that fails does not stop the next.
# Usage: [PYTHON=python3] [OUT=bench/results/gpu] bash bench/gpu.sh
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
OUT=${OUT:-bench/results/gpu}
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no GPU that torch sees: nothing was run"
  exit 0
fi
mkdir -p "$OUT"
failed=0
part() { # part NAME COMMAND…: its output in $OUT/NAME.txt, the last line (JSON) in $OUT/NAME.json
  local name=$1
  shift
  echo "== $name"
  if "$@" > "$OUT/$name.txt" 2> "$OUT/$name.err"; then
    tail -n 1 "$OUT/$name.txt" > "$OUT/$name.json"
  else
    echo "$name failed: see $OUT/$name.err"
    failed=1
  fi
}
part doctor "$PYTHON" -m echogen doctor --json
part tests "$PYTHON" -m pytest tests/engine tests/kernels
part cycle "$PYTHON" -m echogen cycle --layout examples/overlap.json --out "$OUT/cycle" --device cuda --json
exit "$failed"
