# rarefy_own_code(<target>): warnings as errors, sanitizer and reproducible floating point for a target of this project.
function(rarefy_own_code target)
  target_compile_options(
    ${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Werror -ffp-contract=off -fno-math-errno>)
  if(RAREFY_SANITIZER)
    # Findings end the program, or ctest would not see them. GCC's -Wmaybe-uninitialized misfires on instrumented code, the standard library's own <regex> included.
    target_compile_options(
      ${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${RAREFY_SANITIZER} -fno-sanitize-recover=all
                                                 -fno-omit-frame-pointer>
                        $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-maybe-uninitialized>)
    target_link_options(${target} PRIVATE -fsanitize=${RAREFY_SANITIZER})
  endif()
endfunction()
