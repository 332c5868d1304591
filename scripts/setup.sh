#!/usr/bin/env bash
# Makes this checkout ready to run: system packages (Debian), .venv, and the editable build in build/dev. Does only what is
# missing, so a second run takes seconds. The other scripts source it; afterwards .venv/bin is first on PATH.
#
#   PYTHON=python3.12 bash scripts/setup.sh      another interpreter for a new .venv (3.11 or later)
#   CMAKE_BUILD_PARALLEL_LEVEL=2                 fewer compilers at a time (each takes up to 2 GB)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '[setup] %s\n' "$*"; }
fail() {
  printf '[setup] %s\n' "$*" >&2
  exit 1
}

# --- System packages -------------------------------------------------------------------------------------------------
python="${PYTHON:-python3}"
[[ -x .venv/bin/python ]] && python=.venv/bin/python
cxx="${CXX:-g++}"

preprocesses() { printf '%b' "$1" | "$cxx" -E -x c++ -; }
find_missing_packages() {
  missing=()
  need() { "${@:2}" >/dev/null 2>&1 || missing+=("$1"); }
  need g++ command -v "$cxx"
  need libeigen3-dev preprocesses '#include <eigen3/Eigen/src/Core/util/Macros.h>\n'
  need catch2 preprocesses '#if !__has_include(<catch2/catch.hpp>) && !__has_include(<catch2/catch_all.hpp>)\n#error\n#endif\n'
  need python3-venv "$python" -c 'import ensurepip, sys, venv; assert sys.version_info >= (3, 11)'
  need python3-dev "$python" -c \
    'import pathlib, sysconfig; assert (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists()'
  if [[ $(id -u) == 0 ]]; then  # builds are faster with it and work without it: not worth asking for
    need ccache command -v ccache
  fi
}

find_missing_packages
if ((${#missing[@]})); then
  if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    fail "missing: ${missing[*]} (Debian's names; Python must be 3.11 or later). Install them, as root on Debian with" \
      "'apt-get install ${missing[*]}', and run this again."
  fi
  say "installing Debian packages: ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null </dev/null
  find_missing_packages
  ((${#missing[@]} == 0)) || fail "still missing after apt-get install: ${missing[*]} ($("$python" --version) in use)."
fi

# --- Python environment ----------------------------------------------------------------------------------------------
if [[ ! -x .venv/bin/python ]]; then
  say "creating .venv with $("$python" --version)"
  "$python" -m venv .venv
fi
export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"

# --- The build -------------------------------------------------------------------------------------------------------
# What the build depends on, as one hash. Python sources are run from where they are, so only their names count.
fingerprint() {
  {
    find cpp bindings cmake tests/cpp examples/cpp -type f ! -path '*/__pycache__/*' -print0 | sort -z | xargs -0 sha256sum
    sha256sum CMakeLists.txt pyproject.toml constraints.txt scripts/setup.sh
    find python -name '*.py*' ! -path '*/__pycache__/*' | sort
    .venv/bin/python --version
    .venv/bin/python -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || echo "no torch"
  } | sha256sum | cut -d ' ' -f 1
}
stamp=.venv/rarefy-build.sha256

if [[ -f build/dev/CMakeCache.txt && -f $stamp && $(<"$stamp") == "$(fingerprint)" ]]; then
  say "build/dev and .venv are up to date"
else
  start=$SECONDS
  say "installing torch and the build tools into .venv"
  # torch first: the extension is compiled against the one that will run, and nothing later may pull another.
  .venv/bin/python -m pip install -qq -c constraints.txt torch "scikit-build-core>=0.10" cmake ninja
  say "building rarefy in build/dev and installing it with its development packages (minutes the first time)"
  .venv/bin/python -m pip install -qq --no-build-isolation -c constraints.txt -e '.[dev]' \
    -C build-dir=build/dev -C cmake.define.RAREFY_BUILD_TESTS=ON -C cmake.define.RAREFY_BUILD_EXAMPLES=ON
  fingerprint >"$stamp"
  say "built in $((SECONDS - start)) s"
fi
