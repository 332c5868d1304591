#!/usr/bin/env bash
# Sets up, builds and runs the main job: real images go through training, distillation, pruning, quantization and export,
# once from Python (this script's arguments go there; --help lists them) and once with only C++.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

python_example=examples/python/compress_cnn.py
cpp_example=build/dev/examples/cpp/compress_mlp
[[ -f $python_example ]] || fail "$python_example is not there"
[[ -x $cpp_example ]] || fail "$cpp_example was not built"

printf '\n[demo] python %s %s\n' "$python_example" "$*"
python "$python_example" "$@"

printf '\n[demo] %s out/digits.csv --out out/compress_mlp\n' "$cpp_example"
python examples/cpp/write_digits_csv.py out/digits.csv
"$cpp_example" out/digits.csv --out out/compress_mlp
