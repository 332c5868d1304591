# rarefy_add_isa_sources(<target> <file>...): compile each file once per instruction set, with RAREFY_ISA set to the
# namespace (plain, avx2, avx512) that its functions go to. Which one runs is decided at run time (ops/cpu/isa.h).
# Such a file includes no torch and no standard-library template: an inline function compiled here with AVX-512 could
# otherwise be the copy that the linker keeps for the whole library.
# -Wno-uninitialized, -Wno-maybe-uninitialized: GCC 12 warns inside its own avx512fintrin.h (GCC bug 105593).
function(rarefy_add_isa_sources target)
  set(flags_plain "")
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    set(isas plain avx2 avx512)
    set(flags_avx2 -mavx2 -mfma -mf16c)
    set(flags_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512)
  else()
    set(isas plain)
  endif()
  foreach(file IN LISTS ARGN)
    get_filename_component(stem "${file}" NAME_WE)
    get_filename_component(path "${file}" ABSOLUTE)
    foreach(isa IN LISTS isas)
      set(wrapper "${CMAKE_CURRENT_BINARY_DIR}/isa/${stem}.${isa}.cpp")
      file(CONFIGURE OUTPUT "${wrapper}" CONTENT "#define RAREFY_ISA @isa@\n#define RAREFY_ISA_@isa@ 1\n#include \"@path@\"\n" @ONLY)
      set_source_files_properties(
        "${wrapper}" PROPERTIES COMPILE_OPTIONS "-O3;-fno-trapping-math;-Wno-uninitialized;-Wno-maybe-uninitialized;${flags_${isa}}" SKIP_PRECOMPILE_HEADERS ON
                                OBJECT_DEPENDS "${path}")
      target_sources(${target} PRIVATE "${wrapper}")
    endforeach()
  endforeach()
  if(isas STREQUAL "plain")
    target_compile_definitions(${target} PRIVATE RAREFY_PLAIN_ONLY=1)
  endif()
endfunction()
