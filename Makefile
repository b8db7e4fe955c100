# make demo     set everything up, prune a network, time, draw
# make test     set everything up, run the tests: minutes; one file: make test ARGS=tests/test_schedule.py
# make test-all the tests, asan, and what only a kernel author or a release needs
# make asan     op tests on C++ kernels that report wrong memory accesses and undefined behaviour
# make lint     formatters and type checks                     make bench    op throughput on this device
# make install  set everything up and stop there
PYTHON ?= python3
VENV ?= .venv
# Processes that run the tests, a thread each: their threads would only wait for one another. None but one for a file.
WORKERS ?= $(if $(findstring tests/,$(ARGS)),0,2)
# Tests that ask for two threads on a busy machine take minutes if one spins while the other waits for a core.
THREADS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
PYTEST = $(THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
# The only files that can hold tests marked `kernels`: Triton's interpreter runs no others, nor are others imported.
INTERPRETED = $(if $(findstring tests/,$(ARGS)),,$(shell grep -rlwE "kernels|slow_interpreted" tests --include="test_*.py"))
BIN := $(VENV)/bin
# Tests are rewritten and compiled once, not by each of the processes.
unexport PYTHONDONTWRITEBYTECODE
TORCH := "torch>=2.10,<2.16"
# Where PyTorch and torchvision come from; without CUDA: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
BUILD_DEPS := "setuptools>=77" wheel "pybind11>=2.13" "cmake>=3.25" ninja
# AddressSanitizer must be loaded before Python, and finds C++ exceptions only if their library is there already.
SANITIZERS = $(foreach library,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(library).so))
SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*)
# What pip says is shown only where it fails.
install = $(BIN)/python -m pip install $(1) > $(VENV)/pip.log 2>&1 || { cat $(VENV)/pip.log >&2; exit 1; }
# Processes of asan, which share the tests
SHARES = $(if $(ARGS),0,0 1)

.PHONY: install demo test test-all asan bench lint clean
.DELETE_ON_ERROR:

install: $(VENV)/demo.done
	@echo "installed: $(BIN)/cropr --help"

demo: $(VENV)/demo.done
	@$(BIN)/python -m examples.demo $(ARGS)

test: $(VENV)/test.done
	$(PYTEST) -m "not slow" $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) -m "kernels and not slow" $(INTERPRETED) $(ARGS) || [ $$? = 5 ]  # 5: not one of these is for kernels

# A third process, as tests of several processes, browsers and stopped commands wait.
test-all: private WORKERS := $(if $(findstring tests/,$(ARGS)),0,3)
test-all: test asan $(VENV)/test-all.done
	$(PYTEST) -m slow $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) -m "kernels and slow" $(INTERPRETED) $(ARGS)

# Uncaptured: a report ends a process. The package that is built here is not the one that is installed.
asan: $(VENV)/test.done
	@test $(words $(wildcard $(SANITIZERS))) = 3 || \
		{ echo "make asan needs GCC with libasan and libubsan; $(CXX) has none" >&2; exit 1; }
	CXX=$(CXX) CMAKE_BUILD_TYPE=None CXXFLAGS="-O1 -g1 -fsanitize=address,undefined -fno-omit-frame-pointer" \
		$(BIN)/python setup.py --quiet build --build-base build/asan --build-lib build/asan/lib
	code=0; pids=; export LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1; \
	for share in $(SHARES); do \
		CROPR_SHARD=$$share/$(words $(SHARES)) $(THREADS) CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest --capture=no \
			--override-ini pythonpath=build/asan/lib -k "not (reference or compiled or cuda or triton)" $(if $(findstring tests/,$(ARGS)),,tests/ops) $(ARGS) & \
		pids="$$pids $$!"; \
	done; \
	for pid in $$pids; do wait $$pid || code=$$?; done; exit $$code

bench: $(VENV)/test.done
	$(BIN)/python -m benchmarks.kernels.prune_cpu $(ARGS)

lint: $(VENV)/dev.done
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pre-commit run --all-files

$(VENV)/torch.done:
	@echo "Installing PyTorch into $(VENV): minutes, and 6.5 GB of disk with CUDA (2.5 GB without: TORCH_INDEX, see README)"
	@$(PYTHON) -m venv $(VENV)
	@$(call install,--upgrade pip)
	@$(call install,$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX) torchvision) $(TORCH))
	@$(call install,$(BUILD_DEPS))
	@touch $@

$(VENV)/%.done: $(VENV)/torch.done $(SOURCES)
	@echo "Building the package and installing what '$*' needs: minutes"
	@$(call install,--no-build-isolation --editable ".[$*]")
	@touch $@

clean:
	rm -rf build dist out *.egg-info cropr_kernels/*.so $(VENV)
