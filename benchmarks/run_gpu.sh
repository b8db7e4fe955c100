#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that already has torch, triton, cmake, ninja, pybind11 and pytest. Builds in
# place, then runs the named steps, each under ten minutes; results go to $OUT after every cell, so a run that is cut
# off loses nothing.
#   bash benchmarks/run_gpu.sh [tests|models|sanitize|ops|kernels|networks|compiled|table|latency_curve|training|demo|accuracy|camvid|bccd|coco128 ...]
# The last four want CROPR_DATA, the folder that the scripts describe, and the train extra; without it they are skipped.
# Default: all of them. A step that runs out of minutes says so; start it again and it goes on where it stopped.
# Afterwards copy $OUT/*.json to benchmarks/results/ and run
# python -m benchmarks.report and python -m benchmarks.kernels.roofline.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/gpu}
mkdir -p "$OUT"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
python3 setup.py build_ext --inplace > "$OUT/build.log" 2>&1 || { tail -30 "$OUT/build.log"; exit 1; }
status=0
logged() {  # logged NAME COMMAND...
  local name=$1
  shift
  timeout 580 "$@" 2>&1 | tee "$OUT/$name.log" || status=1
}
for step in "${@:-tests models sanitize ops kernels networks compiled table latency_curve training demo accuracy camvid bccd coco128}"; do for part in $step; do
  echo "== $part"
  case $part in
    tests)
      logged tests python3 -m pytest -q -p no:cacheprovider --junitxml="$OUT/tests.xml" -k cuda tests/ops/test_select.py \
        tests/ops/test_prune.py tests/ops/test_attend.py tests/ops/test_merge.py tests/ops/test_residual.py tests/ops/test_contract.py ;;
    models) logged models python3 -m pytest -q -p no:cacheprovider --junitxml="$OUT/models.xml" -m gpu tests ;;
    sanitize)
      for check in memcheck racecheck; do
        timeout 280 compute-sanitizer --tool $check --error-exitcode 9 python3 -m pytest -q -p no:cacheprovider tests/ops/test_prune.py \
          tests/ops/test_select.py tests/ops/test_attend.py tests/ops/test_merge.py tests/ops/test_residual.py \
          -k "cuda and (shape0 or shape2 or hard or layout or priority_comes)" \
          > "$OUT/$check.log" 2>&1 || { status=1; tail -20 "$OUT/$check.log"; }
      done ;;
    ops) logged ops python3 -m benchmarks.kernels.prune_gpu --out "$OUT/gpu_ops.json" ;;
    kernels) logged kernels python3 -m benchmarks.kernels.kernels_gpu --out "$OUT/gpu_kernels.json" ;;
    networks) logged networks python3 -m benchmarks.models.networks --out "$OUT/cuda_networks.json" ;;
    compiled)
      logged compiled python3 -m benchmarks.models.networks --modes compiled --models vit_small_patch16_224 \
        vit_large_patch16_224 --batches 1 64 --out "$OUT/cuda_networks.json" ;;
    table) logged table python3 -m benchmarks.models.table --out "$OUT/cuda_table.json" ;;
    latency_curve) logged latency_curve python3 -m benchmarks.models.latency_curve --out "$OUT/cuda_latency_curve.json" ;;
    training) logged training python3 -m benchmarks.models.training_step --out "$OUT/cuda_training.json" ;;
    accuracy|camvid|bccd|coco128)
      if [ ! -d "${CROPR_DATA:-}" ]; then echo "skipped: CROPR_DATA names no folder"; continue; fi
      case $part in
        accuracy) logged accuracy python3 -m benchmarks.accuracy.classification --data "$CROPR_DATA" --photos 30000 --compare 5000 \
          --epochs 5 --batch 128 --lr 3e-4 --workers 12 --out "$OUT/accuracy.json" ;;
        camvid) logged camvid python3 -m benchmarks.accuracy.segmentation --data "$CROPR_DATA" --epochs 60 --out "$OUT/segmentation.json" ;;
        bccd|coco128)
          logged $part python3 -m benchmarks.accuracy.detection --data "$CROPR_DATA" --set $part --epochs 60 \
            --out "$OUT/detection_$part.json" ;;
      esac ;;
    demo) logged demo python3 -m examples.demo --out "$OUT" ;;
    *) echo "unknown step: $part"; exit 2 ;;
  esac
done; done
exit $status
