# Find the torch that will run: the one of the Python interpreter, unless Torch_DIR or CMAKE_PREFIX_PATH already name one.
set(Python_FIND_VIRTUALENV FIRST)
set(rarefy_python_components Interpreter)
if(RAREFY_BUILD_BINDINGS)
  list(APPEND rarefy_python_components Development.Module)
endif()
if(SKBUILD)
  find_package(Python 3.10 REQUIRED COMPONENTS ${rarefy_python_components})
else()
  if(NOT Python_EXECUTABLE AND EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/.venv/bin/python")
    set(Python_EXECUTABLE "${CMAKE_CURRENT_SOURCE_DIR}/.venv/bin/python")
  endif()
  find_package(Python 3.10 COMPONENTS ${rarefy_python_components})
endif()

if(NOT Torch_DIR AND Python_Interpreter_FOUND)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "import torch; print(torch.utils.cmake_prefix_path)"
    OUTPUT_VARIABLE rarefy_torch_prefix
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET
    RESULT_VARIABLE rarefy_torch_result)
  if(rarefy_torch_result EQUAL 0)
    list(APPEND CMAKE_PREFIX_PATH "${rarefy_torch_prefix}")
  endif()
endif()

# A GPU build of torch adds flags and architectures for CUDA code that uses its headers. Ours does not, so they are dropped.
find_package(Torch QUIET)
unset(CMAKE_CUDA_FLAGS)
if(NOT Torch_FOUND)
  message(
    FATAL_ERROR
      "LibTorch was not found. Either install torch into the Python that CMake uses (${Python_EXECUTABLE}), "
      "or pass -DTorch_DIR=<libtorch>/share/cmake/Torch.")
endif()
get_filename_component(RAREFY_TORCH_LIBRARY_DIR "${TORCH_LIBRARY}" DIRECTORY)
get_filename_component(RAREFY_TORCH_ROOT "${RAREFY_TORCH_LIBRARY_DIR}" DIRECTORY)
set(RAREFY_TORCH_INCLUDE_DIR "${RAREFY_TORCH_ROOT}/include")

include(rarefyTorchVersion)
rarefy_torch_version("${RAREFY_TORCH_ROOT}" RAREFY_TORCH_VERSION)
message(STATUS "rarefy: torch ${RAREFY_TORCH_VERSION} in ${RAREFY_TORCH_ROOT}")

find_package(Eigen3 3.3 QUIET NO_MODULE)
if(NOT Eigen3_FOUND AND Python_Interpreter_FOUND)
  # PyPI's cmeel-eigen, for machines without Debian's libeigen3-dev.
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import sysconfig, pathlib; print(pathlib.Path(sysconfig.get_path('purelib')) / 'cmeel.prefix')"
    OUTPUT_VARIABLE rarefy_cmeel_prefix OUTPUT_STRIP_TRAILING_WHITESPACE)
  find_package(Eigen3 3.3 REQUIRED NO_MODULE PATHS "${rarefy_cmeel_prefix}")
endif()
