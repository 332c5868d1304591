"""The package around the code: versions, what importing does, what is installed, and what it links."""

import importlib.metadata
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import rarefy
from rarefy import _core

ROOT = Path(__file__).resolve().parents[2]
PREFIX = Path(rarefy.cmake_prefix_path)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_one_version_everywhere():
    version = re.search(r"project\(\s*rarefy\s+VERSION\s+([0-9.]+)", (ROOT / "CMakeLists.txt").read_text())[1]
    config = (PREFIX / "share/cmake/rarefy/rarefyConfigVersion.cmake").read_text()
    assert rarefy.__version__ == version
    assert _core.version() == version
    assert importlib.metadata.version("rarefy") == version
    assert f'#define RAREFY_VERSION "{version}"' in (PREFIX / "include/rarefy/version.h").read_text()
    assert f'set(PACKAGE_VERSION "{version}")' in config


def test_another_torch_is_refused_before_the_extension_is_loaded():
    done = run_python(
        """
        import sys, types
        sys.modules["rarefy._build_info"] = types.SimpleNamespace(version="0.1.0", torch_version="1.2.3+cu999")
        try:
            import rarefy
        except ImportError as error:
            print(error)
        print("extension loaded:", "rarefy._core" in sys.modules)
        """
    )
    assert done.returncode == 0, done.stderr
    assert f"was compiled against torch 1.2.3+cu999, but torch {torch.__version__} is installed" in done.stdout
    assert "reinstall rarefy beside this torch" in done.stdout
    assert "or install torch==1.2.3+cu999" in done.stdout
    assert "extension loaded: False" in done.stdout


def test_show_config_prints_versions_instruction_sets_and_cuda(capsys):
    rarefy.show_config()
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["rarefy"] == rarefy.__version__
    assert lines["built against torch"] == lines["running torch"] == str(torch.__version__)
    assert lines["compiler"]
    assert re.fullmatch(rf"plain(, avx2)?(, avx512)? \(in use: {_core.instruction_set()}\)", lines["instruction sets"])
    assert lines["CUDA kernels"] == ("yes" if _core.has_cuda_kernels() else "no")
    assert lines["GPU"].startswith("available (" if torch.cuda.is_available() else "not available")
    assert lines["CMake prefix"] == rarefy.cmake_prefix_path


@pytest.mark.parametrize(
    "path",
    [
        "lib/librarefy.so",
        "include/rarefy/rarefy.h",
        "include/rarefy/version.h",
        "share/cmake/rarefy/rarefyConfig.cmake",
        "share/cmake/rarefy/rarefyTargets.cmake",
    ],
)
def test_the_package_is_a_prefix_for_cmake(path):
    assert (PREFIX / path).is_file()


def test_only_public_headers_are_installed():
    public = {path.relative_to(ROOT / "cpp/include") for path in (ROOT / "cpp/include").rglob("*.h")}
    public |= {
        path.relative_to(ROOT / "cpp/include").with_suffix("") for path in (ROOT / "cpp/include").rglob("*.h.in")
    }
    assert {path.relative_to(PREFIX / "include") for path in (PREFIX / "include").rglob("*.*")} == public


def test_the_package_is_typed():
    source = Path(rarefy.__file__).parent
    assert (source / "py.typed").is_file()
    assert (source / "_core" / "__init__.pyi").is_file()


def test_the_stub_is_that_of_the_module():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/generate_stubs.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (PREFIX / "lib/librarefy.so", "$ORIGIN/../../torch/lib"),
        (Path(_core.__file__), "$ORIGIN/lib:$ORIGIN/../torch/lib"),
    ],
    ids=["library", "extension"],
)
def test_libraries_are_searched_relative_to_the_package(file, expected):
    dynamic = subprocess.run(["readelf", "-d", "-W", file], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic) == [expected]
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "/" in name]
    if torch.version.cuda is None:
        assert not [name for name in needed if "cuda" in name.lower()]


def opened_libraries(code: str) -> set[str]:
    """Return the names of all libraries that the dynamic loader tries to open while code runs."""
    done = run_python(code, LD_DEBUG="files,libs")
    assert done.returncode == 0, done.stdout
    wanted = re.findall(r"find library=(\S+)|file=(\S+) \[", done.stderr)
    return {Path(a or b).name for a, b in wanted}


@pytest.mark.skipif(sys.platform != "linux", reason="LD_DEBUG is glibc's")
def test_importing_and_running_on_the_cpu_opens_no_cuda_library():
    by_torch = opened_libraries("import torch; torch.ones(3) + 1")
    by_rarefy = opened_libraries(
        """
        import torch, rarefy
        scale, zero_point = torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32)
        torch.ops.rarefy.fake_quantize(torch.ones(3), scale, zero_point, None, -128, 127)
        maps = open("/proc/self/maps").read()
        assert "librarefy" in maps
        """
    )
    added = by_rarefy - by_torch
    assert "librarefy.so" in added
    assert not [name for name in added if re.search("cuda|nvrtc|cublas|cudnn", name)]
    if torch.version.cuda is None:
        assert not [name for name in by_rarefy if name.startswith("libcuda")]


def test_the_environment_variable_chooses_the_instruction_set():
    done = run_python("import rarefy; print(rarefy._core.instruction_set())", RAREFY_ISA="plain")
    assert done.stdout.strip() == "plain"


def test_a_wrong_instruction_set_in_the_environment_is_named():
    done = run_python(
        """
        import torch, rarefy
        scale, zero_point = torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32)
        try:
            torch.ops.rarefy.fake_quantize(torch.ones(3), scale, zero_point, None, -128, 127)
        except ValueError as error:
            print(error)
        """,
        RAREFY_ISA="sse9",
    )
    assert "[RAREFY_ISA] must be one of plain, avx2 and avx512 that this processor has" in done.stdout, done.stderr
    assert "got 'sse9'" in done.stdout


def test_a_wrong_instruction_set_is_named_and_changes_nothing():
    before = _core.instruction_set()
    with pytest.raises(ValueError, match=r"\[set_instruction_set\] must be one of .* got 'sse9'"):
        _core.set_instruction_set("sse9")
    assert _core.instruction_set() == before


@pytest.mark.slow
def test_installed_headers_compile_as_cpp20_without_warnings(tmp_path):
    """All of them in one file, in an order in which none can rely on what rarefy.h brought before it."""
    headers = sorted(str(path.relative_to(PREFIX / "include")) for path in (PREFIX / "include").rglob("*.h"))
    headers.sort(key=lambda header: header == "rarefy/rarefy.h")
    source = tmp_path / "headers.cpp"
    source.write_text(
        "".join(f"#include <{header}>\n" for header in headers) + "static_assert(__cplusplus >= 202002L);\n"
    )
    torch_include = Path(torch.__file__).parent / "include"
    command = [
        *[os.environ.get("CXX", "g++"), "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic", "-Werror"],
        *[f"-I{PREFIX / 'include'}", "-isystem", torch_include, "-isystem", torch_include / "torch/csrc/api/include"],
        source,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
