#!/usr/bin/env bash
# Builds and runs tests/consumer, copied out of the source tree, against what `cmake --install` wrote (prefix) or against
# the installed Python package (wheel, where torch must be found without being named). After scripts/setup.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
kind="${1:?usage: test_consumer.sh prefix|wheel}"
python="$PWD/.venv/bin/python"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

case "$kind" in
  prefix)
    rm -rf build/prefix
    cmake --install build/dev --prefix build/prefix >/dev/null
    prefix="$PWD/build/prefix;$("$python" -c 'import torch; print(torch.utils.cmake_prefix_path)')"
    installed=build/prefix
    ;;
  wheel)
    prefix="$("$python" -c 'import rarefy; print(rarefy.cmake_prefix_path)')"
    installed="$prefix"
    ;;
  *)
    echo "usage: test_consumer.sh prefix|wheel, got '$kind'" >&2
    exit 2
    ;;
esac

if grep -rnF -e "$PWD/build/dev" -e "$PWD/cpp" "$installed/share" "$installed/include"; then
  echo "the installed files above point into the source or build tree" >&2
  exit 1
fi

cp -r tests/consumer "$work/source"
cmake -S "$work/source" -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$prefix" >"$work/log" 2>&1 ||
  { cat "$work/log" >&2; exit 1; }
cmake --build "$work/build"
env -u LD_LIBRARY_PATH ctest --test-dir "$work/build" --output-on-failure --no-tests=error -V
