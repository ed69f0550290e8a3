# The headers and libtorch of the torch that the building Python imports, as the target fastweights::torch.
# Only the stable ABI is used, so Caffe2's and CUDA's package files are not needed.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import torch, pathlib; root = pathlib.Path(torch.__file__).parent; print(torch.__version__); print(root)"
  OUTPUT_VARIABLE torch_facts
  ERROR_VARIABLE torch_error
  RESULT_VARIABLE torch_result
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT torch_result EQUAL 0)
  message(FATAL_ERROR
    "fastweights needs an installed torch >= 2.10 to build (it is not a build requirement, so that pip does not fetch "
    "another one). Run:\n  pip install torch && pip install --no-build-isolation fastweights\n${torch_error}")
endif()
string(REPLACE "\n" ";" torch_facts "${torch_facts}")
list(GET torch_facts 0 TorchStable_VERSION)
list(GET torch_facts 1 torch_root)
if(TorchStable_VERSION VERSION_LESS 2.10)
  message(FATAL_ERROR "fastweights needs torch >= 2.10, found ${TorchStable_VERSION}. Run: pip install -U torch")
endif()

add_library(fastweights_torch INTERFACE)
add_library(fastweights::torch ALIAS fastweights_torch)
target_include_directories(fastweights_torch SYSTEM INTERFACE ${torch_root}/include)
target_compile_definitions(fastweights_torch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
# By file and without a run path: `import torch` has loaded it before anything of ours is.
target_link_libraries(fastweights_torch INTERFACE ${torch_root}/lib/libtorch_cpu.so)
set(TorchStable_FOUND TRUE)
