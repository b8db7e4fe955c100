# make demo   set everything up, train, time and draw          make test    set everything up, run all tests
# make bench  op throughput on this device                     make lint    formatters and type checks
PYTHON ?= python3
VENV ?= .venv
# Processes that run the tests, a thread each: their threads would only wait for one another.
WORKERS ?= 2
BIN := $(VENV)/bin
BUILD_DEPS := "torch>=2.10,<2.16" "setuptools>=77" wheel "pybind11>=2.13" "cmake>=3.25" ninja
SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*)

.PHONY: demo test bench lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.done
	$(BIN)/python -m examples.demo $(ARGS)

test: $(VENV)/test.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) -m kernels $(ARGS)

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
