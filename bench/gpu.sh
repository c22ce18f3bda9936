#!/usr/bin/env bash
# Everything that needs a GPU, in order of value; a part that fails does not stop the next.
# Usage: [PYTHON=python3] [OUT=bench/results/gpu] [SECONDS_IN_ALL=570] bash bench/gpu.sh
# Leaves PART.txt (output), PART.err and, of parts that end with a line of JSON, PART.json;
# summary.json holds every line of JSON by part.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
OUT=${OUT:-bench/results/gpu}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-570}
if ! "$PYTHON" -c 'import torch' 2> /dev/null; then
  echo "$PYTHON has no torch: nothing was run"
  exit 0
fi
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no GPU that torch sees: nothing was run"
  exit 0
fi
mkdir -p "$OUT"
rm -f "$OUT"/*.json "$OUT"/*.txt "$OUT"/*.err "$OUT"/failed
unset TRITON_INTERPRET ECHOGEN_FORCE_REFERENCE
part() { # part NAME MOST_SECONDS COMMAND…: a part that hangs is ended, and so is one out of time
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
part doctor 60 "$PYTHON" -m echogen doctor --json
# Each file in a process of its own, four at a time: an illegal access ends every later test of
# its process.
for file in tests/kernels/test_*.py; do
  part "$(basename "$file" .py)" 240 "$PYTHON" -m pytest "$file" &
  while [ "$(jobs -rp | wc -l)" -ge 4 ]; do wait -n; done
done
wait
for operator in $("$PYTHON" -c '
from echogen.bench.registry import cases
print(*dict.fromkeys(c.operator for c in cases().values()))'); do
  part "kernels_$operator" 120 "$PYTHON" -m echogen bench kernels --device cuda \
    --operator "$operator" --out "$OUT/kernels_$operator" --json
done
part cycle 120 "$PYTHON" -m echogen cycle --layout examples/overlap.json --out "$OUT/cycle" \
  --device cuda --json
part test_engine 240 "$PYTHON" -m pytest tests/engine
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
