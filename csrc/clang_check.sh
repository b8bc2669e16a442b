#!/bin/sh
# Reads every .cpp that needs no CUDA header with clang++, the compiler of a Mac, and with g++, by
# the package's own flags; a warning is an error. No code is made. One file a core; exits non-zero
# at the first failure. Needs an environment with torch and pybind11, and both compilers. For CI.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
flags=$(python - "$here/../rmipo_lite/ops/build.py" <<'EOF'
import runpy
import sys
import sysconfig

import pybind11
from torch.utils.cpp_extension import include_paths

print(*runpy.run_path(sys.argv[1], run_name="build")["compile_flags"]("cpu")["cxx"])
for path in (*include_paths("cpu"), pybind11.get_include(), sysconfig.get_path("include")):
    print("-isystem", path)
EOF
)
export flags
for source in "$here"/cpu/*.cpp "$here"/bindings.cpp; do
  printf 'clang++ "%s"\ng++ "%s"\n' "$source" "$source"
done | xargs -P "$(nproc)" -n 2 sh -c '
  "$1" $flags -fsyntax-only -Wall -Wextra -Werror "$2" || exit 255
  echo "ok $1 $(basename "$2")"' sh
