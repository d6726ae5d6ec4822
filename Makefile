# Every target sets up what it needs in .venv and is quick when nothing changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= demo
PACKAGES := core sdk plugins/llama plugins/bloom plugins/mixtral plugins/qwen_moe plugins/deepseek plugins/qwen plugins/llava plugins/qwen_vl
MANIFESTS := Makefile pyproject.toml constraints.txt $(addsuffix /pyproject.toml,$(PACKAGES))
# Modules are compiled when they are first imported, as most never are; where Python may not keep what it compiles, all are
# here, by every processor. Our packages are built by what is in $(VENV).
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile --no-build-isolation --constraint constraints.txt
COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true)

.PHONY: serve test test-gpu lint isolated wheels docs model-results clean

serve: $(VENV)/serve.stamp  ## serve the demo model on 127.0.0.1:8000 (MODEL=… for another)
	$(BIN)/light serve $(MODEL) $(ARGS)

# Two workers, one thread each: more threads than cores would wait for each other in every product.
test: $(VENV)/dev.stamp  ## the CPU tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

test-gpu: $(VENV)/dev.stamp  ## the tests that need one CUDA device
	$(BIN)/python -m pytest -q -m gpu $(ARGS)

lint: $(VENV)/dev.stamp  ## ruff, mypy, import-linter, codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

isolated: $(VENV)/dev.stamp  ## installs each plugin alone in a clean environment and serves with it
	$(BIN)/python tests/isolated.py

wheels: $(VENV)/serve.stamp  ## builds a wheel of each package into dist/
	for package in $(PACKAGES); do $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist ./$$package || exit 1; done

docs: $(VENV)/dev.stamp  ## writes the generated pages
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/models.py

model-results: $(VENV)/dev.stamp  ## runs the checks of every family on the CPU and writes down what they found in docs/
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p light_sdk.testing.results --model-results docs/models/cpu.json plugins
	$(BIN)/python docs/models.py

clean:
	rm -rf $(VENV) dist

# torch first and by its pinned version: an unpinned one may bring another build of it.
$(VENV)/serve.stamp: $(MANIFESTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) hatchling editables
	$(INSTALL) $(addprefix --editable ./,$(PACKAGES))
	$(COMPILE)
	touch $@

$(VENV)/dev.stamp: $(VENV)/serve.stamp
	$(INSTALL) --editable '.[dev]'
	$(COMPILE)
	touch $@
