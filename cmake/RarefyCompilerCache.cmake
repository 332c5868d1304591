# Compile through ccache where it is installed. Precompiled headers need the sloppiness below, or every file misses.
find_program(RAREFY_CCACHE ccache)
if(RAREFY_CCACHE)
  foreach(language CXX CUDA)
    if(NOT CMAKE_${language}_COMPILER_LAUNCHER)
      set(CMAKE_${language}_COMPILER_LAUNCHER
          "${CMAKE_COMMAND};-E;env;CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime;${RAREFY_CCACHE}")
    endif()
  endforeach()
endif()
