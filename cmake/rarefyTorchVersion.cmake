# rarefy_torch_version(<root> <variable>): the version of the torch in <root>, with its build tag. torch's version.py has it
# ("2.13.0+cpu"); a bare libtorch has the file build-version instead. Installed too, for rarefyConfig.cmake.
function(rarefy_torch_version root variable)
  if(EXISTS "${root}/version.py")
    file(STRINGS "${root}/version.py" version REGEX "^__version__ = ")
    string(REGEX REPLACE ".*['\"]([^'\"]+)['\"].*" "\\1" version "${version}")
  else()
    file(STRINGS "${root}/build-version" version LIMIT_COUNT 1)
  endif()
  set(${variable} "${version}" PARENT_SCOPE)
endfunction()
