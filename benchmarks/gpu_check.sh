#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in under ten minutes: builds the CUDA kernels, runs the CUDA
# tests, the scorecard's GPU checks (compute-sanitizer's four tools among them) and the benchmarks.
#
#     bash benchmarks/gpu_check.sh OUT              # on a machine with a GPU
#     bash benchmarks/gpu_check.sh OUT --rehearse   # every line that runs without one
#
# Needs torch with CUDA, nvcc, the package's dependencies and pytest; trl, liger-kernel and
# cut-cross-entropy where they are to be measured too. Nothing outside the repository is read. OUT
# gets at most five files: summary.txt (one line a step, seconds, outcome), build.txt, tests.txt,
# sanitizer.txt and gpu.csv, whose rows belong into benchmarks/. A step that fails doesn't stop
# those after it; the exit code is that of the worst.
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: bash benchmarks/gpu_check.sh OUT [--rehearse]" >&2; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
rehearse=${2:-}
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root" || exit 2
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export RMIPO_LITE_CACHE="$scratch/cache" # kernels of these sources, compiled here
worst=0
python=${PYTHON:-$(command -v python3 || command -v python)}

# step NAME SECONDS FILE COMMAND...: run with a time limit, keep its output, note how it ended
step() {
  local name=$1 limit=$2 file=$3 start=$SECONDS code=0 left=$((590 - SECONDS))
  [ "$limit" -le "$left" ] || limit=$((left > 5 ? left : 5)) # all of it in under ten minutes
  shift 3
  echo "== $name" | tee -a "$file"
  timeout --kill-after=10 "$limit" "$@" >>"$file" 2>&1 || code=$?
  local outcome=ok
  [ "$code" = 0 ] || { outcome="FAILED ($code)"; worst=1; }
  printf '%-28s %4s s  %s\n' "$name" "$((SECONDS - start))" "$outcome" | tee -a "$out/summary.txt"
}

: >"$out/summary.txt"
for file in build tests sanitizer; do : >"$out/$file.txt"; done
if [ "$rehearse" = --rehearse ]; then
  device=cpu mark="not cuda and not slow and not notebook and not benchmark" bench=--quick
else
  device=cuda mark="cuda" bench=""
fi

step "machine" 60 "$out/build.txt" $python - <<'PYTHON'
import platform, shutil, subprocess
import torch
print(platform.platform(), "Python", platform.python_version(), "torch", torch.__version__)
for tool, option in (("nvidia-smi", "-L"), ("nvcc", "--version"), ("compute-sanitizer", "--version")):
    path = shutil.which(tool)
    print(tool, path)
    if path:
        print(subprocess.run([path, option], capture_output=True, text=True).stdout)
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))
PYTHON
step "build for $device" 240 "$out/build.txt" $python -c "
import sys
from rmipo_lite.ops import native
print(native.status('$device'))
sys.exit(not native.use_native('native', __import__('torch').device('$device')))"
step "tests of the operators" 150 "$out/tests.txt" \
  $python -m pytest -o addopts= -q -p no:cacheprovider -m "$mark" tests/ops/test_cuda.py tests/model/test_varlen_attention.py
[ "$device" = cuda ] && step "the other CUDA tests" 120 "$out/tests.txt" \
  $python -m pytest -o addopts= -q -p no:cacheprovider -m cuda tests/planning/test_budget.py tests/training/test_step.py

# The checks that want a GPU: more than 2^31 logits (41), compute-sanitizer's four tools (42), and of
# the selftest streams and running out of memory (43). Each says why where it can't run.
PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" step "scorecard 41, 42" 240 "$out/sanitizer.txt" \
  $python -m tests.trials --only 41,42
step "selftest 43" 60 "$out/sanitizer.txt" $python -m rmipo_lite.selftest --only 4,43
# Where there is no compute-sanitizer the compiler's own read the kernels' source, on the CPU.
PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" command -v compute-sanitizer >/dev/null ||
  step "kernels on the CPU, sanitized" 120 "$out/sanitizer.txt" $python -m pytest -o addopts= -q \
    -p no:cacheprovider -m "slow or not slow" -k sanitizer tests/ops/test_cuda_kernels.py

# shellcheck disable=SC2086
step "benchmarks gpu $bench" 420 "$out/build.txt" $python -m benchmarks gpu $bench \
  --output_dir "$out"
if [ -d "$out/quick" ]; then mv "$out/quick/gpu.csv" "$out/gpu.csv"; rmdir "$out/quick"; fi
cat "$out/summary.txt"
exit "$worst"
