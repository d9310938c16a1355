#!/usr/bin/env bash
# Builds, tests and measures everything that needs a GPU, on a bare machine without a network; needs torch >= 2.11, nvcc
# and pytest. In two parts of a few minutes each, so that what fails in the first can be repaired before the second:
#
#   benchmarks/gpu.sh first           build test map loss: at most 200 seconds
#   benchmarks/gpu.sh rest            all others: at most 330 seconds
#
#   benchmarks/gpu.sh                 all stages; LIMIT=300 sets the limit in seconds, at most 550
#   benchmarks/gpu.sh map train       only these stages, of: build test map loss train norms evaluate profile ncu rivals
#                                     whole triton sanitize races
#   DEVICE=cpu benchmarks/gpu.sh      every stage on the CPU with tiny shapes, to find errors
#
# Each stage has a time limit; the results so far are always in benchmarks/results/<device>.json and, if OUT is set, in
# that folder. Only "build" replaces the libraries; without it, those that are there are used.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
python=${PYTHON:-python3}
PATH=$(dirname "$(command -v "$python")"):$PATH  # cmake and ninja may be installed next to it
device=${DEVICE:-cuda}
first="build test map loss"
rest="train norms evaluate profile ncu rivals whole triton sanitize races"
stages=${*:-$first $rest}
default=500
case $stages in first) stages=$first default=200 ;; rest) stages=$rest default=330 ;; esac
limit=${LIMIT:-$default} # seconds for all stages
if ((limit > 550)); then limit=550; fi # one command on a lent machine may take 600
table=25                               # seconds of it for the table at the end
tiny=()
[ "$device" = cuda ] || tiny=(--tiny)

left() { echo $((limit - table - SECONDS)); }
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
  failed=$(sed -nE "s/^FAILED ([^ ]+).*/\1/p; s/.*crashed while running '([^']+)'.*/\1/p" "$log" | head -1)
  rm -f "$log"
  return "$status"
}

notes=()
note() { # kept until the results file is known
  notes+=("$1" "$2")
  save_notes
}

save_notes() {
  [ -n "$out" ] && ((${#notes[@]})) || return 0
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
failed=
[ -e recontrast/kernels ] || ln -s ../kernels recontrast/kernels # CMake makes it too, but not every run builds

# Reads torch from a cold disk once, while the compiler runs, and not in each of many test workers at the same time.
"$python" -c 'import torch, timm, triton, scipy, sklearn' >/dev/null 2>&1 &
warming=$!

build() { # with CMake, which continues after an error: an error in a CPU source must not prevent the CUDA library
  local architecture
  architecture=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return 1
  export CUDAARCHS=$architecture-real # only for this GPU: takes a third of the time
  rm -f recontrast/_*.so # a failed build must not leave old libraries to be measured
  cmake --fresh -B build/gpu -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" &&
    cmake --build build/gpu -- -k 0
  local status=$?
  if [ ! -f recontrast/_cuda.so ]; then # CMake, pybind11 or the headers of Python are missing: the kernels need none
    local torch target
    torch=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))') || return 1
    target=$(grep -oE 'TORCH_TARGET_VERSION=\w+' CMakeLists.txt)
    nvcc -shared -std=c++20 -O3 -Xcompiler -fPIC -arch="sm_$architecture" -DUSE_CUDA -DTORCH_STABLE_ONLY -D"$target" \
      -isystem "$torch/include" -o recontrast/_cuda.so csrc/*.cu \
      -L"$torch/lib" -Xlinker --no-as-needed -ltorch -ltorch_cpu && echo "compiled by nvcc alone"
  fi
  [ -f recontrast/_cuda.so ] || echo "ERROR SUMMARY: NO NATIVE KERNELS, TRITON RUNS INSTEAD"
  return $status
}
export -f build
export python
[ "$device" = cuda ] && stage build 130 bash -c build
wait "$warming"

name=$("$python" - "$device" <<'PY'
import re, sys, torch

name = torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "cpu-dry-run"
print(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))
PY
) || { echo "no device $device"; exit 1; }
if [ "$device" = cuda ]; then out=benchmarks/results/$name.json; else out=$logs/$name.json; fi
mkdir -p benchmarks/results
if [ $# -eq 0 ] || [ "$*" = first ]; then rm -f "$out"; fi # a full run starts a new file; single stages are added
save_notes

# Every operator against the float64 oracle on random inputs: odd sizes, all dtypes and layouts, empty inputs, gradcheck,
# opcheck, graph capture, a step without synchronisation. Parallel with pytest-xdist: most of the time, Triton compiles.
tests=(tests/test_cosine_sums.py tests/test_mined_loss.py tests/test_norm_act.py tests/test_anomaly_map_op.py tests/test_loss.py
       tests/training/test_cuda_graph.py tests/training/test_precision.py tests/metrics/test_streaming.py::test_any_path_counts_the_same)
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n "${WORKERS:-$(($(nproc) > 4 ? $(nproc) - 2 : 2))}")
choice=()
if [ "$device" = cuda ]; then choice=(-k "not cpu and not kernels_compile and not compiles and not processes"); else choice=(-k "nothing"); fi
check() { # NAME SECONDS TESTS...; the first failure again, alone: a fault in a kernel also fails all later tests
  failed=
  stage "$1" "$2" "$python" -m pytest "${@:3}" -q -W default -p no:cacheprovider --durations=5 "${parallel[@]}" "${choice[@]}"
  if [ -n "$failed" ] && [ "$device" = cuda ]; then
    CUDA_LAUNCH_BLOCKING=1 stage "$1 again" 60 "$python" -m pytest "$failed" -q -W default -p no:cacheprovider -n 0
  fi
}
check test 150 "${tests[@]}"

# Each measures its most important rows first. The limits exceed the total; few stages need all of theirs.
measure map 15 map
measure loss 75 loss
measure train 75 train
measure norms 25 norms
measure evaluate 25 evaluate
measure profile 15 profile

counters() { # what the kernels of the loss reach of the memory's bandwidth
  command -v ncu >/dev/null || { echo "no ncu"; return 0; }
  ncu --clock-control none --kernel-name 'regex:sums_by|gradient_by|summarise_pieces|combine_pieces' --launch-count 12 \
    --section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy --section WarpStateStats \
    "$python" benchmarks/gpu.py kernels --out "$1" --device cuda
}
export -f counters
[ "$device" = cuda ] && stage ncu 45 bash -c "counters '$out'"

measure rivals 30 rivals
measure whole 25 whole
CUDA_LAUNCH_BLOCKING=1 measure "train blocked" 12 train --only reference
check "triton test" 75 tests/kernels/test_triton.py tests/kernels/test_norm_act_triton.py
RECONTRAST_BACKEND=triton measure "triton map" 12 map --only ours
RECONTRAST_BACKEND=triton measure "triton loss" 30 loss --only ours
RECONTRAST_BACKEND=triton measure "triton norms" 20 norms --only ours

sanitize() { # memcheck or racecheck; last, because kernels run many times slower under it
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer"; return 0; }
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # one allocation per tensor, so that its end is checked
  compute-sanitizer --tool "$1" --error-exitcode 9 "$python" benchmarks/sanitize.py
}
export -f sanitize
if [ "$device" = cuda ]; then
  stage sanitize 90 bash -c 'sanitize memcheck'
  stage races 60 bash -c 'sanitize racecheck'
else
  stage sanitize 60 "$python" benchmarks/sanitize.py cpu
fi

printf '\n'
timeout "$table" "$python" benchmarks/gpu.py table --out "$out" --device "$device"
printf '\n%s, %s s\n' "$out" "$SECONDS"
keep
