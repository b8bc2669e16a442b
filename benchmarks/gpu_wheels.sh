#!/usr/bin/env bash
# The packages of gpu_wheels.txt for Python 3.12 on x86-64 Linux with CUDA 13, unpacked into
# build/gpu_site, for a machine that can't fetch them itself. gpu_check.sh takes that folder where it
# is there; carry it along with the tree. Fails where tree and folder are more than 64 MiB together.
#
#     bash benchmarks/gpu_wheels.sh
set -euo pipefail
cd "$(dirname "$0")/.."
site=build/gpu_site
rm -rf "$site"
platforms=()
for name in manylinux_2_28 manylinux_2_24 manylinux_2_17 manylinux2014; do
  platforms+=(--platform "${name}_x86_64")
done
python3 -m pip install -q --no-deps --no-compile --only-binary=:all: --python-version 3.12 \
  --implementation cp "${platforms[@]}" --target "$site" -r benchmarks/gpu_wheels.txt
# bitsandbytes brings a library for every CUDA, ROCm and XPU; the machine loads one.
find "$site/bitsandbytes" -name 'libbitsandbytes_*.so' ! -name '*_cpu.so' ! -name '*_cuda13*.so' -delete
# What travels: every file that git doesn't ignore, and the folder.
bytes=$({ git ls-files -z --cached --others --exclude-standard && find "$site" -type f -print0; } |
  xargs -0 stat -c %s | awk '{ sum += $1 } END { print sum }')
printf '%s: %s; with the tree %d MiB of 64\n' "$site" "$(du -sh "$site" | cut -f1)" $((bytes >> 20))
[ "$bytes" -lt $((64 << 20)) ]
