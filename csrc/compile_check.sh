#!/bin/sh
# Compiles every .cu for every supported architecture, without a GPU and without torch; a warning
# is an error, and so is a spilled register. One a core; exits non-zero at the first failure. For CI.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=${CUDA_HOME:-}
if [ -z "$root" ]; then
  # The nvcc on PATH can be a wrapper: it says itself where its toolkit is.
  nvcc=$(command -v nvcc) || { echo "compile_check: no nvcc on PATH; set CUDA_HOME" >&2; exit 1; }
  root=$("$nvcc" --dryrun -x cu /dev/null -c -o /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' | head -n 1)
  [ -n "$root" ] || root=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
fi
[ -f "$root/include/cuda_runtime.h" ] || {
  echo "compile_check: $root is no CUDA toolkit (no include/cuda_runtime.h)" >&2; exit 1; }
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export root out
for source in "$here"/cuda/*_kernel.cu; do
  for arch in 75 80 86 89 90 120; do printf '"%s" %s\n' "$source" "$arch"; done
done | xargs -P "$(nproc)" -n 2 sh -c '
  "$root/bin/nvcc" -std=c++17 -O3 -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror \
    -Xptxas -warn-spills,-Werror -D__CUDA_NO_BFLOAT16_CONVERSIONS__ -D__CUDA_NO_HALF_CONVERSIONS__ \
    -gencode "arch=compute_$2,code=sm_$2" -c "$1" -o "$out/$(basename "$1")-$2.o" || exit 255
  echo "ok sm_$2 $(basename "$1")"' sh
