#!/usr/bin/env bash
# Sets up, builds and runs all tests: C++ (ctest), Python (pytest, which gets this script's arguments), and a separate
# CMake project against an installed prefix and against the Python package. Runs every part, fails when one failed.
set -euo pipefail
cd "$(dirname "$0")/.."
begin=$SECONDS
source scripts/setup.sh
summary="setup $((SECONDS - begin)) s"
failed=()

part() {  # part NAME COMMAND...
  local start=$SECONDS
  printf '\n[test] %s: %s\n' "$1" "${*:2}"
  "${@:2}" || failed+=("$1")
  summary+=", $1 $((SECONDS - start)) s"
}

part ctest ctest --test-dir build/dev --output-on-failure --no-tests=error -j "$(nproc)"
# A process per core, up to four (each takes up to 3 GB); a file's tests stay together, for its fixtures.
workers=$(($(nproc) < 4 ? $(nproc) : 4))
part pytest env OMP_NUM_THREADS=$(($(nproc) / workers)) python -m pytest -n "$workers" --dist loadfile "$@"
part "consumer of a prefix" bash scripts/test_consumer.sh prefix
part "consumer of the wheel" bash scripts/test_consumer.sh wheel

printf '\n[test] %s, total %d s\n' "$summary" $((SECONDS - begin))
if ((${#failed[@]})); then
  printf '[test] FAILED: %s\n' "$(IFS=';'; echo "${failed[*]}")" >&2
  exit 1
fi
echo "[test] all parts passed"
