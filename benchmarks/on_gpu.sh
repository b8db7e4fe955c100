#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that already has torch, triton, cmake, ninja, pybind11 and pytest: build
# in place, tests, compute-sanitizer on small shapes, op sweep. Results go to $OUT after every cell.
#   bash benchmarks/on_gpu.sh [tests|sanitize|ops|demo ...]     default: all of them
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/gpu}
mkdir -p "$OUT"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
python3 setup.py build_ext --inplace > "$OUT/build.log" 2>&1 || { tail -30 "$OUT/build.log"; exit 1; }
status=0
for step in "${@:-tests sanitize ops demo}"; do for part in $step; do
  case $part in
    tests) python3 -m pytest tests -q -p no:cacheprovider --junitxml="$OUT/tests.xml" 2>&1 | tee "$OUT/tests.log" || status=1 ;;
    sanitize)
      for check in memcheck racecheck; do
        compute-sanitizer --tool $check --error-exitcode 9 python3 -m pytest -q -p no:cacheprovider tests/test_rows.py \
          tests/test_select.py tests/test_attend.py -k "cuda and (shape0 or shape2 or hard or layout)" \
          > "$OUT/$check.log" 2>&1 || { status=1; tail -20 "$OUT/$check.log"; }
      done ;;
    ops) python3 benchmarks/gpu.py --out "$OUT/gpu_ops.json" 2>&1 | tee "$OUT/ops.log" || status=1 ;;
    demo) python3 examples/demo.py --out "$OUT" 2>&1 | tee "$OUT/demo.log" || status=1 ;;
    *) echo "unknown step: $part"; exit 2 ;;
  esac
done; done
exit $status
