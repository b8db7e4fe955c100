# make demo   set everything up, train, time and draw          make test    set everything up, run all tests
# make bench  op throughput on this device                     make lint    formatters and type checks
# make asan   op tests on C++ kernels that report wrong memory accesses and undefined behaviour
PYTHON ?= python3
VENV ?= .venv
# Processes that run the tests, a thread each: their threads would only wait for one another.
WORKERS ?= 2
BIN := $(VENV)/bin
BUILD_DEPS := "torch>=2.10,<2.16" "setuptools>=77" wheel "pybind11>=2.13" "cmake>=3.25" ninja
# AddressSanitizer must be loaded before Python, and finds C++ exceptions only if their library is there already.
SANITIZERS = $(foreach library,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(library).so))
SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*)

.PHONY: demo test asan bench lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.done
	$(BIN)/python -m examples.demo $(ARGS)

test: $(VENV)/test.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) -m kernels $(ARGS)

# In one process and uncaptured: a report ends it. The package that is built here is not the one that is installed.
asan: $(VENV)/test.done
	@test $(words $(wildcard $(SANITIZERS))) = 3 || \
		{ echo "make asan needs GCC with libasan and libubsan; $(CXX) has none" >&2; exit 1; }
	CXX=$(CXX) CMAKE_BUILD_TYPE=RelWithDebInfo CXXFLAGS="-fsanitize=address,undefined -fno-omit-frame-pointer" \
		$(BIN)/python setup.py --quiet build --build-base build/asan --build-lib build/asan/lib
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest --capture=no \
		--override-ini pythonpath=build/asan/lib -k "not (reference or cuda or triton)" tests/ops $(ARGS)

bench: $(VENV)/test.done
	$(BIN)/python -m benchmarks.kernels.prune_cpu $(ARGS)

lint: $(VENV)/dev.done
	$(BIN)/pre-commit run --all-files

$(VENV)/torch.done:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(BUILD_DEPS)
	touch $@

$(VENV)/%.done: $(VENV)/torch.done $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[$*]"
	touch $@

clean:
	rm -rf build dist out *.egg-info cropr_kernels/*.so $(VENV)
