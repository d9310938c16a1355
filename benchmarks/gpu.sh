#!/usr/bin/env bash
# Builds, tests and measures everything that needs a GPU, on a bare machine without a network; needs torch >= 2.11, nvcc
# and pytest. Takes at most 8 minutes. Each stage has a time limit; the results so far are always in
# benchmarks/results/<device>.json and, if OUT is set, in that folder.
#
#   benchmarks/gpu.sh                 all stages; LIMIT=570 raises the limit, in seconds
#   benchmarks/gpu.sh map train       only these stages, of: build test sanitize loss map train evaluate rivals whole
#                                     triton races
#   DEVICE=cpu benchmarks/gpu.sh      every stage on the CPU with tiny shapes, to find errors
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
python=${PYTHON:-python3}
PATH=$(dirname "$(command -v "$python")"):$PATH  # cmake and ninja may be installed next to it
device=${DEVICE:-cuda}
limit=${LIMIT:-450}  # seconds for all stages
stages=${*:-build test sanitize loss map train evaluate rivals whole triton races}
tiny=()
[ "$device" = cuda ] || tiny=(--tiny)

left() { echo $((limit - SECONDS)); }
wanted() { [[ " $stages " == *" $1 "* ]]; }

# stage NAME SECONDS COMMAND...: runs the command for at most SECONDS or the time left, and records how it ended.
stage() {
  local name=$1 seconds=$2 status begun=$SECONDS log
  shift 2
  wanted "${name%% *}" || return 0
  if ((seconds > $(left))); then seconds=$(left); fi
  if ((seconds < 5)); then
    note "$name" "no time left"
    return 0
  fi
  printf '\n== %s (at %ss, at most %ss)\n' "$name" "$SECONDS" "$seconds" | tee -a "$logs/gpu.log"
  log=$(mktemp)
  timeout -k 5 "$seconds" "$@" 2>&1 | tee -a "$logs/gpu.log" "$log" | tail -n 20
  status=${PIPESTATUS[0]}
  note "$name" "status $status after $((SECONDS - begun)) s $(grep -E '[0-9]+ (passed|failed)|ERROR SUMMARY' "$log" | tail -2 | tr '\n' ' ')"
  rm -f "$log"
}

notes=()
note() { # kept until the results file is known
  notes+=("$1" "$2")
  [ -n "$out" ] || return 0
  "$python" - "$out" "${notes[@]}" <<'PY'
import json, os, sys

path, *notes = sys.argv[1:]
record = json.load(open(path)) if os.path.exists(path) else {}
record.setdefault("stages", {}).update(zip(notes[::2], notes[1::2]))
with open(path + ".part", "w") as file:
    file.write(json.dumps(record, indent=1) + "\n")
os.replace(path + ".part", path)
PY
  keep
}

keep() { # so that OUT has the results so far if this script is killed
  [ -z "${OUT:-}" ] || [ "$device" != cuda ] || cp "$out" "$OUT/"
}

measure() { # NAME SECONDS ARGUMENTS...: the program knows its time limit and starts no row that it cannot finish
  local name=$1 seconds=$2
  shift 2
  if ((seconds > $(left))); then seconds=$(left); fi
  stage "$name" "$((seconds + 15))" "$python" benchmarks/gpu.py "$@" --out "$out" --device "$device" \
    --seconds "$seconds" "${tiny[@]}"
}

logs=${OUT:-$(mktemp -d)}
out=
[ -e recontrast/kernels ] || ln -s ../kernels recontrast/kernels # CMake makes it too, but not every run builds

build() { # with CMake, which continues after an error: an error in a CPU source must not prevent the CUDA library
  local architecture
  architecture=$("$python" -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability())') || return 1
  export CUDAARCHS=$architecture # only for this GPU: takes a third of the time
  rm -f recontrast/_*.so # a failed build must not leave old libraries to be measured
  cmake --fresh -B build/gpu -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" &&
    cmake --build build/gpu -- -k 0
  local status=$?
  [ -f recontrast/_cuda.so ] || echo "ERROR SUMMARY: NO NATIVE KERNELS, TRITON RUNS INSTEAD"
  return $status
}
export -f build
export python
[ "$device" = cuda ] && stage build 120 bash -c build

name=$("$python" - "$device" <<'PY'
import re, sys, torch

name = torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "cpu-dry-run"
print(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))
PY
) || { echo "no device $device"; exit 1; }
if [ "$device" = cuda ]; then out=benchmarks/results/$name.json; else out=$logs/$name.json; fi
mkdir -p benchmarks/results
if [ $# -eq 0 ]; then rm -f "$out"; fi # a full run starts a new file; single stages are added

# Every operator against the float64 oracle on random inputs: odd sizes, all dtypes and layouts, empty inputs, gradcheck,
# opcheck, graph capture, a step without synchronisation. Parallel with pytest-xdist: most of the time, Triton compiles.
tests=(tests/test_cosine_sums.py tests/test_mined_loss.py tests/test_norm_act.py tests/test_anomaly_map_op.py tests/test_loss.py
       tests/training/test_cuda_graph.py tests/training/test_precision.py tests/metrics/test_streaming.py::test_any_path_counts_the_same)
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n "${WORKERS:-$(($(nproc) > 4 ? $(nproc) - 2 : 2))}")
choice=()
if [ "$device" = cuda ]; then choice=(-k "not cpu and not kernels_compile and not compiles and not processes"); else choice=(-k "nothing"); fi
check() { stage "$1" "$2" "$python" -m pytest "${@:3}" -q -W default -p no:cacheprovider --durations=5 "${parallel[@]}" "${choice[@]}"; }
check test 110 "${tests[@]}"

sanitize() { # memcheck or racecheck
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer"; return 0; }
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # one allocation per tensor, so that its end is checked
  compute-sanitizer --tool "$1" --error-exitcode 9 "$python" benchmarks/sanitize.py
}
export -f sanitize
if [ "$device" = cuda ]; then
  stage sanitize 35 bash -c 'sanitize memcheck'
else
  stage sanitize 35 "$python" benchmarks/sanitize.py cpu
fi

# Each measures its most important rows first. The limits exceed the total; few stages need all of theirs.
measure map 15 map
measure loss 75 loss
measure norms 25 norms
measure train 60 train
CUDA_LAUNCH_BLOCKING=1 measure "train blocked" 12 train --only reference
measure evaluate 25 evaluate
measure rivals 30 rivals
measure whole 25 whole
check "triton test" 75 tests/kernels/test_triton.py tests/kernels/test_norm_act_triton.py
RECONTRAST_BACKEND=triton measure "triton map" 12 map --only ours
RECONTRAST_BACKEND=triton measure "triton loss" 30 loss --only ours
RECONTRAST_BACKEND=triton measure "triton norms" 20 norms --only ours
if [ "$device" = cuda ]; then stage races 60 bash -c 'sanitize racecheck'; fi

printf '\n'
timeout 20 "$python" benchmarks/gpu.py table --out "$out" --device "$device"
printf '\n%s, %s s\n' "$out" "$SECONDS"
keep
