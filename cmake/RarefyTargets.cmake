# rarefy_own_code(<target>): warnings as errors, sanitizer and reproducible floating point for a target of this project.
function(rarefy_own_code target)
  target_compile_options(
    ${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Werror -ffp-contract=off -fno-math-errno>)
  if(RAREFY_SANITIZER)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${RAREFY_SANITIZER}
                                             -fno-omit-frame-pointer>)
    target_link_options(${target} PRIVATE -fsanitize=${RAREFY_SANITIZER})
  endif()
endfunction()
