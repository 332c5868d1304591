# CUDA sources take plain pointers and a stream and include no torch header, so nvcc compiles them beside a CPU build of
# torch too. Without nvcc the files are left out; nothing else changes.
#
# The architectures are a property of our target: a GPU build of torch sets CMAKE_CUDA_ARCHITECTURES to OFF.
set(RAREFY_CUDA_ARCHITECTURES
    "80-real;90-real;90-virtual"
    CACHE STRING "Architectures of the CUDA kernels, as in CMAKE_CUDA_ARCHITECTURES")
set(RAREFY_HAS_CUDA OFF)
if(NOT RAREFY_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(CMAKE_CUDA_STANDARD 17)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    set(RAREFY_HAS_CUDA ON)
  elseif(RAREFY_CUDA STREQUAL "ON")
    message(FATAL_ERROR "RAREFY_CUDA=ON, but no nvcc was found; put it on PATH or set CMAKE_CUDA_COMPILER.")
  endif()
endif()
message(STATUS "rarefy: CUDA kernels ${RAREFY_HAS_CUDA}")
