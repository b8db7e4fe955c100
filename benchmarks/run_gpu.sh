#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has torch, triton, cmake, ninja, pybind11, pytest and hypothesis.
#
#   bash benchmarks/run_gpu.sh [STEP ...]      default: all steps, those that tell most first
#
#   smoke        cropr doctor: every op once in each dtype, small networks; two minutes, most of them compilation
#   tests        the kernels' tests, in 8 processes, as most of their time is compilation too
#   stress       races: thousands of launches
#   sanitize     small tests under compute-sanitizer's four tools
#   ops kernels networks models compiled table latency_curve training demo      tests of models, and measurements
#   accuracy camvid bccd coco128      want CROPR_DATA, the folder that the scripts describe, and the train extra
#   collect      nothing but what every call does at its end
#
# A call takes LIMIT seconds (590) at most, the build and all steps together. What has no time left says so: the same call
# goes on there, without the steps that are done, as everything is in out/gpu (remove it to start anew). At its end a call
# copies the JSON to benchmarks/results and packs it and the logs into two files in OUT (out/gpu). The exit code is 1 if
# a step failed, 3 if one is left to do. Then: python -m benchmarks.report; python -m benchmarks.kernels.roofline
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
LIMIT=${LIMIT:-590} WORK=$PWD/out/gpu PROCESSES=8 status=0
OUT=${OUT:-$WORK}
ALL="smoke tests stress sanitize ops kernels networks models compiled table latency_curve training demo accuracy camvid bccd coco128"
for step in "$@"; do
  case " $ALL collect " in *" $step "*) ;; *) echo "unknown step: $step" >&2; exit 2 ;; esac
done
steps=("$@")
[ $# != 0 ] || read -ra steps <<< "$ALL"
mkdir -p "$OUT" "$WORK/logs" "$WORK/done"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1

START=$(date +%s)
left() { echo $((LIMIT - 5 - ($(date +%s) - START))); }

enough() {  # enough NAME: whether any time is left
  [ "$(left)" -gt 0 ] && return
  echo "$1: no time left in this call"
  [ $status = 0 ] && status=3
  return 1
}

finish() {  # finish NAME CODE
  case $2 in
    0) touch "$WORK/done/$1" ;;
    124 | 137) echo "$1: ran out of time"; [ $status = 0 ] && status=3 ;;
    *) echo "$1: failed with exit code $2"; status=1 ;;
  esac
}

logged() {  # logged NAME COMMAND...
  local name=$1
  shift
  enough "$name" || return
  timeout --kill-after=3 "$(left)" "$@" 2>&1 | tee "$WORK/logs/$name.log"
  finish "$name" "${PIPESTATUS[0]}"
}

shared() {  # shared NAME ARGUMENTS...: pytest in several processes, each with its share of the tests
  local name=$1 shard pid own code=0 pids=()
  shift
  enough "$name" || return
  for ((shard = 0; shard < PROCESSES; shard++)); do
    OMP_NUM_THREADS=2 CROPR_SHARD=$shard/$PROCESSES timeout --kill-after=3 "$(left)" python3 -m pytest -q -p no:cacheprovider "$@" \
      > "$WORK/logs/$name.$shard.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || { own=$?; [ $own = 5 ] || [ $code = 1 ] || code=$own; }  # 5: no test for that process
  done
  grep -hE "^(FAILED|ERROR|E  )|passed|failed|error" "$WORK/logs/$name".*.log
  finish "$name" $code
}

sanitize() {
  local check number=0 code ours filter name
  command -v compute-sanitizer > /dev/null || { echo "sanitize: skipped, not installed: compute-sanitizer"; return; }
  [ -e "$WORK/done/sanitize" ] && rm "$WORK/done"/sanitize*
  ours=$(sed -n 's/^def \(\w*_kernel\)(.*/\1/p' cropr_kernels/ops/triton/*.py | paste -sd '|')
  for check in memcheck racecheck synccheck initcheck; do
    number=$((number + 1)) name=sanitize.$check filter=(--error-exitcode 9 --kernel-name "regex=^($ours)")
    [ -e "$WORK/done/$name" ] && continue
    enough "$name" || return
    # What initcheck does not look at counts as never written: it looks at all kernels, and ours are searched for below.
    [ $check = initcheck ] && filter=()
    # Inside of one large allocation nothing is out of bounds, and nothing uninitialised for long.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --kill-after=3 $(($(left) / (5 - number) + 1)) \
      compute-sanitizer --tool $check --print-limit 200 "${filter[@]}" python3 -m pytest -q -p no:cacheprovider \
      tests/ops --ignore tests/ops/test_stress.py -k "cuda and (shape0 or shape2 or hard or layout or priority_comes)" \
      > "$WORK/logs/$name.log" 2>&1
    code=$?
    if [ $code = 0 ] && [ $check = initcheck ] && grep -qE "^=+ +at ($ours)" "$WORK/logs/$name.log"; then code=9; fi
    [ $code = 0 ] || grep -E -A4 "^=+ (Invalid|Uninitialized|Error|Warning|Barrier|ERROR SUMMARY|RACECHECK SUMMARY)|^FAILED" \
      "$WORK/logs/$name.log" | head -40
    finish "$name" $code
  done
  for check in memcheck racecheck synccheck initcheck; do [ -e "$WORK/done/sanitize.$check" ] || return; done
  touch "$WORK/done/sanitize"
}

collect() {
  local log
  if compgen -G "$WORK/*.json" > /dev/null; then
    cp "$WORK"/*.json benchmarks/results/
    (cd "$WORK" && tar -czf "$OUT/results.tar.gz" ./*.json)
  fi
  rm -rf "$WORK/short"
  mkdir "$WORK/short"
  for log in "$WORK"/logs/*; do tail -c 2000000 "$log" > "$WORK/short/$(basename "$log")"; done
  tar -C "$WORK/short" -czf "$OUT/logs.tar.gz" .
}

build() {  # unless what is there is newer than its sources
  local module
  module=cropr_kernels/_C$(python3 -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
  [ -e "$module" ] && [ -z "$(find csrc CMakeLists.txt setup.py -newer "$module")" ] && return
  echo "== build"
  timeout --kill-after=3 "$(left)" python3 setup.py build_ext --inplace > "$WORK/logs/build.log" 2>&1 ||
    { tail -30 "$WORK/logs/build.log"; exit 1; }
}

installed() {  # installed STEP MODULE...: whether all of them are
  local step=$1
  shift
  python3 - "$step" "$@" <<< "
import importlib.util, sys
missing = [module for module in sys.argv[2:] if importlib.util.find_spec(module) is None]
sys.exit(f'{sys.argv[1]}: skipped, not installed: {missing}' if missing else 0)" 2>&1
}

data() {  # data STEP: whether there are photos
  [ -d "${CROPR_DATA:-}" ] || { echo "$1: skipped, CROPR_DATA names no folder"; return 1; }
  installed "$1" torchvision PIL matplotlib
}

trap collect EXIT
build
for step in "${steps[@]}"; do
  if [ $# = 0 ] && [ -e "$WORK/done/$step" ]; then continue; fi
  echo "== $step, $(left) s left"
  case $step in
    smoke) logged smoke python3 -m cropr_kernels.cli doctor --device cuda ;;
    tests) shared tests tests/ops tests/cli/test_doctor.py --ignore tests/ops/test_stress.py -k cuda ;;
    stress) logged stress python3 -m pytest -q -p no:cacheprovider -m gpu tests/ops/test_stress.py ;;
    sanitize) sanitize ;;
    ops) logged ops python3 -m benchmarks.kernels.prune_gpu --minutes 60 --out "$WORK/gpu_ops.json" ;;
    kernels) logged kernels python3 -m benchmarks.kernels.kernels_gpu --out "$WORK/gpu_kernels.json" ;;
    networks) logged networks python3 -m benchmarks.models.networks --minutes 60 --out "$WORK/cuda_networks.json" ;;
    models) shared models tests -m gpu --ignore tests/ops/test_stress.py ;;
    compiled)
      logged compiled python3 -m benchmarks.models.networks --modes compiled --models vit_small_patch16_224 \
        vit_large_patch16_224 --batches 1 64 --minutes 60 --out "$WORK/cuda_networks.json" ;;
    table) logged table python3 -m benchmarks.models.table --minutes 60 --out "$WORK/cuda_table.json" ;;
    latency_curve) logged latency_curve python3 -m benchmarks.models.latency_curve --out "$WORK/cuda_latency_curve.json" ;;
    training) logged training python3 -m benchmarks.models.training_step --out "$WORK/cuda_training.json" ;;
    demo) installed demo matplotlib PIL sklearn huggingface_hub && logged demo python3 -m examples.demo --out "$WORK/demo" ;;
    accuracy)
      data accuracy && logged accuracy python3 -m benchmarks.accuracy.classification --data "$CROPR_DATA" --photos 30000 \
        --compare 5000 --epochs 5 --batch 128 --lr 3e-4 --workers 12 --out "$WORK/accuracy.json" ;;
    camvid)
      data camvid && logged camvid python3 -m benchmarks.accuracy.segmentation --data "$CROPR_DATA" --epochs 60 \
        --out "$WORK/segmentation.json" ;;
    bccd | coco128)
      data "$step" && logged "$step" python3 -m benchmarks.accuracy.detection --data "$CROPR_DATA" --set "$step" \
        --epochs 60 --out "$WORK/detection_$step.json" ;;
  esac
done
exit $status
