# Everything runs in .venv, which `demo`, `test` and the others make on first use.
#
#   PYTHON       the interpreter that makes .venv (3.10 or newer)
#   TORCH_INDEX  where torch and torchvision come from, if not pip's own index: https://download.pytorch.org/whl/cpu has
#                them without CUDA
#   PYTEST_ARGS  for `make test`: -k pattern, -m "not slow", ...
#   JOBS         test processes, each with one torch thread
#   SECONDS      how long `sanitize`, `neon` and `avx512` go on after their least number of cases

PYTHON ?= python3
TORCH_INDEX ?=
PYTEST_ARGS ?=
JOBS ?= 2
SECONDS ?= 0

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check sanitize neon avx512 works-with package bench docs tutorials clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 16

demo: .venv/train.stamp ## train handwritten digits dense and at 2:4, compare them, write runs/demo
	@echo "training 12 small networks, dense and at 2:4; about a minute and a half on 2 cores"
	@$(BIN)/openwork compare classification --out runs/demo

test: .venv/dev.stamp ## run every test and every example of the documentation strings
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) $(PYTEST_ARGS)

check: .venv/dev.stamp sanitize ## lint, formatting, types, layers, the C++ code under sanitizers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_layers.py

# The C++ code on random cases in guarded memory: csrc/tests. SECONDS=300 for a long run.
sanitize: ## run the kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(call kernels,$(CXX))

neon: hint = (Debian: apt-get install g++-aarch64-linux-gnu qemu-user)
neon: ## run the kernels as ARM code in an emulator
	@$(call kernels,aarch64-linux-gnu-g++ qemu-aarch64)

avx512: hint = (Debian: apt-get install libsimde-dev)
avx512: ## run the AVX-512 kernels in plain C, on a machine without AVX-512
	@$(call kernels,$(CXX) /usr/include/simde/x86/avx512.h)

kernels = for each in $(1); do command -v $$each > /dev/null || test -e $$each || { echo "skipped: no $$each $(hint)"; exit 0; }; done; \
  $(MAKE) --no-print-directory -C csrc/tests $@ SECONDS=$(SECONDS)

works-with: .venv/dev.stamp ## run what makes docs/works-with.md, on all nets, and write it
	OMP_NUM_THREADS=1 OPENWORK_WORKS_WITH=build/works-with.json $(BIN)/python -m pytest -m works_with tests $(PYTEST_ARGS)
	PYTHONPATH=tests $(BIN)/python tests/works_with/page.py build/works-with.json > docs/works-with.md

package: ## build the wheel and the source archive, install each, with a compiler and without, and use it
	TORCH_INDEX='$(TORCH_INDEX)' $(PYTHON) tests/install/try_archives.py

bench: .venv/train.stamp ## time a sparse training step against the dense one, on this machine
	$(BIN)/python benchmarks/training_step.py

docs: .venv/docs.stamp ## build the documentation into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

tutorials: .venv/dev.stamp ## run the notebooks of docs/tutorials at full length and store their outputs, some minutes
	$(BIN)/python docs/_site/run_notebooks.py

clean: ## remove what the targets made, but not runs/
	rm -rf .venv build dist openwork.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per extra, written last: an interrupted installation is taken up again.
.venv/%.stamp: .venv/torch.stamp pyproject.toml setup.py $(wildcard csrc/*.*)
	@echo "installing openwork and what '$*' needs into .venv"
	@$(PIP) -qq --editable '.[$*]'
	@$(BIN)/python -c 'import openwork.kernels as k; s = k.status(); s.isa or print(f"warning: everything works, slower: {s}")'
	@touch $@

# torch and its torchvision together and first: what follows then finds them, and nothing that asks for torch can choose
# another one. From an index of their own they come alone (--no-deps); what they need comes with the rest.
.venv/torch.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: Openwork needs Python 3.10 or newer, but '$(PYTHON) --version' says: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "       Name a newer one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "installing torch and torchvision into .venv, once$(if $(TORCH_INDEX),,; without CUDA: make ... TORCH_INDEX=https://download.pytorch.org/whl/cpu)"
	@$(PYTHON) -m venv .venv
	@$(PIP) -qq $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) torch torchvision
	@touch $@
