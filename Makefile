# make demo     run the demo                     make wheel    build dist/leanattn-*.whl
# make test     run the tests                    make format   format C++ and Python, in place
# make clean    remove what was built            make lint     check both, change nothing
# make test-vllm   the tests of vLLM's backend, beside vLLM itself, in .venv-vllm: docs/vllm.md
#
# Each makes its own environment, .venv-dev, from the pinned requirements and builds what it needs.
# PYTHON picks another interpreter; ARGS go to the demo or to pytest: make test ARGS="-k schedule".

PYTHON ?= python3
VENV := .venv-dev

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Folders too, for their time tells of files that are gone.
SOURCES := setup.py pyproject.toml $(shell find csrc leanattn \
  \( -path csrc/cutlass -o -name __pycache__ -o -name '*.md' \) -prune -o -print)

.PHONY: demo test test-vllm build wheel format lint clean

# -I: not from this folder, whose leanattn/ has no compiled part, but from the environment.
demo: build
	$(VENV)/bin/python -I -m leanattn $(ARGS)

# PATH: what the tests compile themselves, they compile with the environment's ninja. The second time
# on an emulated GPU: those files that are mostly about the way to a kernel; all would take an hour.
PYTEST := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/pytest -n auto --dist worksteal
EMULATED := append append_decode append_errors append_torch context_parallel errors float8 flash_attn \
  fuzz head_pairs layouts merge tensor_maps

test: build
	$(PYTEST) $(ARGS)
ifndef ARGS
	$(PYTEST) --emulated-gpu $(EMULATED:%=tests/test_%.py)
endif

# vLLM's wheel is 300 MB and wants a torch of its own, so it has an environment to itself, and comes
# without what it requires. Its attention backends can be imported and driven there, on the CPU too;
# its engine cannot be started. Without a GPU what is built has no CUDA kernels. Not part of `test`.
VLLM := .venv-vllm
VLLM_VERSION := 0.26.0

test-vllm: $(VLLM)/built
	@echo "vLLM $(VLLM_VERSION)'s attention backend CUSTOM, by leanattn: builder and implementation,"
	@echo "driven with vLLM's own metadata; on the CPU, and on a GPU if there is one"
	PATH="$(CURDIR)/$(VLLM)/bin:$$PATH" $(VLLM)/bin/pytest tests/test_vllm.py $(ARGS)

$(VLLM)/built: $(VLLM)/requirements $(SOURCES)
	@rm -rf $(VLLM)/build/lib*
	@DIST_EXTRA_CONFIG=$(VLLM)/build.cfg \
	  LEANATTN_CPU_ONLY=$(shell nvidia-smi -L > /dev/null 2>&1 && echo 0 || echo 1) \
	  $(VLLM)/bin/python tools/show_build.py $(VLLM)/build.log \
	  $(VLLM)/bin/pip install -v --no-build-isolation --no-deps .
	@touch $@

# Compiled files lie apart from those of `build`, which another torch's headers went into.
$(VLLM)/requirements: requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet -r requirements-vllm.txt
	$(VLLM)/bin/pip install --quiet --no-deps vllm==$(VLLM_VERSION)
	printf '[build]\nbuild_base = $(VLLM)/build\n' > $(VLLM)/build.cfg
	@touch $@

build: $(VENV)/built

wheel: $(VENV)/requirements
	rm -rf build/lib* dist
	$(VENV)/bin/pip wheel --no-build-isolation --no-deps --wheel-dir dist .

format: $(VENV)/formatters
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' | xargs -r $(VENV)/bin/clang-format -i
	$(VENV)/bin/ruff format

lint: $(VENV)/formatters
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' | xargs -r $(VENV)/bin/clang-format -n -Werror
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check

clean:
	rm -rf build dist *.egg-info $(VENV)/built $(VLLM)/built $(VLLM)/build

# Compiled files stay in build/, so that a second build takes only what changed; what setuptools
# copied to build/lib* goes, for it would keep modules that are gone from leanattn/.
$(VENV)/built: $(VENV)/requirements $(SOURCES)
	@rm -rf build/lib*
	@$(VENV)/bin/python tools/show_build.py $(VENV)/build.log \
	  $(VENV)/bin/pip install -v --no-build-isolation --no-deps .
	@touch $@

$(VENV)/requirements: requirements-dev.txt requirements-cuda.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "leanattn needs Python >= 3.10: name one, as in 'make PYTHON=python3.12 test'"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv, sysconfig as s; open(s.get_path("include") + "/Python.h")' \
	  2> /dev/null || { echo "leanattn needs Python's venv module and headers: install them" \
	  "(Debian, Ubuntu: apt install python3-venv python3-dev)"; exit 1; }
	@command -v $(firstword $(CXX)) > /dev/null || { echo "leanattn needs a C++ compiler:" \
	  "install one (Debian, Ubuntu: apt install g++)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt
	$(VENV)/bin/pip install --quiet --no-deps -r requirements-cuda.txt
	@touch $@

$(VENV)/formatters: $(VENV)/requirements
	$(VENV)/bin/pip install --quiet clang-format==23.1.5 ruff==0.17.5
	@touch $@
