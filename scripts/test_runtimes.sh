#!/usr/bin/env bash
# Runs tests/runtimes, each part in an environment of its own under build/runtimes: these packages are heavy, and some
# pin what others pin differently. The environments are kept. After scripts/setup.sh, whose build of rarefy they use.
#
#   bash scripts/test_runtimes.sh                    all runtimes
#   bash scripts/test_runtimes.sh executorch litert  some of executorch, litert, coreml
set -euo pipefail
cd "$(dirname "$0")/.."
runtimes=("$@")
((${#runtimes[@]})) || runtimes=(executorch litert coreml)
for name in "${runtimes[@]}"; do
  if [[ ! -f tests/runtimes/test_$name.py ]]; then
    echo "usage: test_runtimes.sh [executorch|litert|coreml ...], got '$name'" >&2
    exit 2
  fi
done
base="$PWD/.venv/bin/python"
if [[ ! -x $base ]] || ! "$base" -c 'import rarefy' 2>/dev/null; then
  echo "[runtimes] .venv must hold rarefy: run scripts/setup.sh first" >&2
  exit 1
fi

# The packages of an extra, as pyproject.toml names them.
packages() {
  "$base" - "$1" <<'EOF'
import sys, tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print("\n".join(extras[sys.argv[1]]))
EOF
}

# The editable rarefy of .venv, without anything else that is installed there: same torch, so the same extension works.
link_rarefy() {
  "$base" - "$1" <<'EOF'
import pathlib, shutil, sys, sysconfig
source, target = pathlib.Path(sysconfig.get_path("purelib")), pathlib.Path(sys.argv[1])
for item in [*source.glob("_editable_skbc_rarefy.*"), *source.glob("rarefy*")]:
    place = target / item.name
    if place.is_symlink() or place.is_file():
        place.unlink()
    elif place.is_dir():
        shutil.rmtree(place)
    place.symlink_to(item)
EOF
}

failed=()
for name in "${runtimes[@]}"; do
  venv="build/runtimes/$name"
  python="$venv/bin/python"
  mapfile -t wanted < <(packages "$name")
  stamp="$venv/installed"
  if [[ ! -f $stamp || $(<"$stamp") != "${wanted[*]} $(<constraints.txt)" ]]; then
    echo "[runtimes] installing ${wanted[*]} in $venv (minutes the first time)"
    mkdir -p build/runtimes
    [[ -x $python ]] || "$base" -m venv "$venv"
    "$python" -m pip install -qq -c constraints.txt torch numpy tqdm pytest pytest-timeout "${wanted[@]}"
    printf '%s' "${wanted[*]} $(<constraints.txt)" >"$stamp"
  fi
  link_rarefy "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
  echo "[runtimes] $name"
  "$python" -m pytest "tests/runtimes/test_$name.py" --show-capture=no || failed+=("$name")
done
if ((${#failed[@]})); then
  echo "[runtimes] FAILED: ${failed[*]}" >&2
  exit 1
fi
echo "[runtimes] all parts passed: ${runtimes[*]}"
