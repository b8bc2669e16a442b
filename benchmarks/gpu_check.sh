#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in two calls that each end by themselves: the first in 200
# seconds, the second in under ten minutes.
#
#     bash benchmarks/gpu_check.sh OUT first    # builds the CUDA kernels; CUDA tests; the head's times
#     bash benchmarks/gpu_check.sh OUT second   # scorecard, peers, whole steps; compute-sanitizer last
#     bash benchmarks/gpu_check.sh OUT first --rehearse   # its lines without one, in twice the time
#
# Needs torch with CUDA, nvcc, the package's dependencies and pytest; trl, liger-kernel and
# cut-cross-entropy where they are to be measured too. What a machine with Python 3.12 lacks of them
# lies unpacked in build/gpu_site (gpu_wheels.sh). Kernels are kept in build/gpu_cache, or in
# $RMIPO_LITE_CACHE, so that the second call builds nothing that the first one built; nothing else
# outside the repository is read. OUT gets summary.txt (one line a step, seconds, outcome), build.txt,
# tests.txt, sanitizer.txt and gpu.csv, whose rows belong into benchmarks/; quick/gpu.csv measures
# nothing. Without the kernels nothing is measured; any other step that fails doesn't stop those
# after it. The exit code is 1 where one failed.
set -uo pipefail
usage() { echo "usage: bash benchmarks/gpu_check.sh OUT first|second [--rehearse]" >&2; exit 2; }
[[ $# -ge 2 && $2 =~ ^(first|second)$ && ${3:---rehearse} = --rehearse ]] || usage
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
call=$2
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root" || exit 2
python=${PYTHON:-$(command -v python3 || command -v python)}
site=""
[ "$("$python" -c 'import sys; print(*sys.version_info[:2])')" = "3 12" ] && site=":$root/build/gpu_site"
export PYTHONPATH="$root$site${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
export RMIPO_LITE_CACHE="${RMIPO_LITE_CACHE:-$root/build/gpu_cache}"
if [ "${3:-}" = --rehearse ]; then
  device=cpu mark="not cuda and not slow and not notebook and not benchmark" quick=--quick slow=2
  csv="$out/quick/gpu.csv" tests="" tools="0 1"
else
  device=cuda mark=cuda quick="" slow=1 csv="$out/gpu.csv"
  tools="0 1 2 3" # memcheck, racecheck, initcheck, synccheck
  tests="tests/planning/test_budget.py tests/step/test_pair_step.py" # whose others are everybody's
fi
case $call in first) total=$((185 * slow)) ;; second) total=$((560 * slow)) ;; esac
kill_after=10 worst=0 # what doesn't end when it is told to: 195 and 570 s in all

# step NAME SECONDS FILE COMMAND...: run with a time limit, keep its output, note how it ended
step() {
  local name=$1 limit=$(($2 * slow)) file=$out/$3 start=$SECONDS code=0 outcome=ok told
  local left=$((total - SECONDS))
  shift 3
  [ "$limit" -le "$left" ] || limit=$left
  echo "== $name" | tee -a "$file"
  told=$(wc -c <"$file")
  if [ "$limit" -ge 5 ]; then
    timeout --kill-after=$kill_after "$limit" "$@" >>"$file" 2>&1 || code=$?
  else
    code=124
  fi
  outcome=$(tail -c "+$((told + 1))" "$file" | grep -o -m1 'not run: .*') || outcome=ok
  case $code in
    0) ;;
    124 | 137) outcome="FAILED (cut at $limit s)" ;;
    *) outcome="FAILED ($code)" ;;
  esac
  [ "$code" = 0 ] || worst=1
  printf '%-28s %4s s  %s\n' "$name" "$((SECONDS - start))" "$outcome" | tee -a "$out/summary.txt"
  return "$code"
}

# build SECONDS: ends the call where there are no kernels, since nothing else would measure ours
build() {
  step "build for $device" "$1" build.txt "$python" -c "
import sys
from rmipo_lite.ops import library
found = library.status('$device')
print(found)
sys.exit(not found.available)" && return
  echo "no kernels for $device: build.txt says why; nothing else was run" | tee -a "$out/summary.txt"
  exit 1
}

bench() { # NAME SECONDS OPTION...
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" build.txt "$python" -m benchmarks gpu --output_dir "$out" "$@"
}

first() {
  step machine 120 build.txt "$python" -m benchmarks.gpu_machine
  build 150
  # -W default: the project's own "every warning is an error" is no rule for another torch.
  step "tests on $device" 150 tests.txt "$python" -m pytest -W default -o addopts= -q \
    -p no:cacheprovider -m "$mark" tests/ops/test_cuda.py tests/model/test_varlen_attention.py $tests
  bench "the head" 60 --part head $quick
  bench "whole steps, a tiny model" 60 --part step --quick --seconds $((50 * slow))
}

# In trials 41: more than 2^31 logits. In selftest 43: streams, and running out of memory.
second() {
  build 150
  step "scorecard 41" 60 sanitizer.txt "$python" -m tests.trials --only 41
  step "selftest 43" 60 sanitizer.txt "$python" -m rmipo_lite.selftest --only 4,43
  bench "the head against others" 90 --part peers $quick
  # Whole steps end by themselves, 110 s before the end: the sanitizers are last and need some.
  local left=$(((total - SECONDS) / slow - 110))
  bench "whole steps" "$((left < 330 ? left : 330))" --part step $quick \
    --seconds "$(((left < 330 ? left : 330) - 30))"
  packing
  # A process for each of the four tools: each waits mostly for its own start.
  step "scorecard 42" 110 sanitizer.txt bash -c '
    running=() code=0
    for tool in $1; do "$0" -m tests.trials --only 42 --trial $tool & running+=($!); done
    for one in "${running[@]}"; do wait "$one" || code=1; done
    exit $code' "$python" "$tools"
}

packing() { # which of our steps ran packed, and which padded
  grep -oE '^gpu step,ours[^,]*,"[^"]*, (packed|padded), [^"]*",,time,' "$csv" |
    sed 's/^gpu step,/  /; s/,,time,$//' | tee -a "$out/summary.txt"
}

: >"$out/summary.txt"
$call
cat "$out/summary.txt"
exit "$worst"
