# One object library per CPU level from the same kernel sources. Everything in them is static or in the level's
# namespace: tests/core/test_binary.py looks for anything else, since the linker could ship it to an older machine.
set(FASTWEIGHTS_FLAGS_baseline "")
set(FASTWEIGHTS_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(FASTWEIGHTS_FLAGS_avx512 ${FASTWEIGHTS_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
                             -mprefer-vector-width=512)
set(FASTWEIGHTS_FLAGS_avx512_bf16 ${FASTWEIGHTS_FLAGS_avx512} -mavx512vnni -mavx512bf16)

if(FASTWEIGHTS_WIDE)
  list(APPEND FASTWEIGHTS_FLAGS_avx2 -DFW_WIDE)
endif()

get_filename_component(FASTWEIGHTS_CSRC ${CMAKE_CURRENT_LIST_DIR}/../csrc ABSOLUTE)

set(FASTWEIGHTS_LEVELS 4 CACHE STRING "How many CPU levels to build, from the lowest")
add_compile_definitions(FW_LEVELS=${FASTWEIGHTS_LEVELS})

function(fastweights_add_levels target sources)
  set(levels baseline)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    list(APPEND levels avx2 avx512 avx512_bf16)
    list(SUBLIST levels 0 ${FASTWEIGHTS_LEVELS} levels)
  endif()
  foreach(level IN LISTS levels)
    add_library(kernels_${level} OBJECT ${sources})
    target_include_directories(kernels_${level} PRIVATE ${FASTWEIGHTS_CSRC})
    target_compile_definitions(kernels_${level} PRIVATE FW_LEVEL=${level})
    target_compile_options(kernels_${level} PRIVATE ${FASTWEIGHTS_FLAGS_${level}} -fno-exceptions -fno-rtti -Wno-psabi
                           # GCC 12 warns about its own AVX-512 header (gcc.gnu.org/PR105593)
                           "$<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized;-Wno-maybe-uninitialized>")
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:kernels_${level}>)
  endforeach()
endfunction()
