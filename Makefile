# Two commands: `make train` trains, exports and samples the demo; `make test` runs the suite.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/pip install --quiet --disable-pip-version-check --editable
CARD_PYTHON ?= python3.12
# Where there is an NVIDIA device, JAX comes with its CUDA plugin.
GPU = $(if $(wildcard /dev/nvidia0),[gpu])

.PHONY: train test compile gguf-check rehearse wheels lint clean

train: runs/demo/export/model.safetensors
	$(BIN)/tinyllama generate runs/demo --prompt "The" --temperature 0.8

# Training goes on where it was stopped, and does nothing when it is complete.
runs/demo/export/model.safetensors: data/demo/code/manifest.json
	$(BIN)/tinyllama train configs/demo.py
	$(BIN)/tinyllama convert runs/demo --to hf runs/demo/export

data/demo/tokenizer.model: | $(VENV)/installed
	$(BIN)/tinyllama tokenizer stdlib --vocab-size 4096 --out $@

# Both sources are prepared in one go, prose first.
data/demo/code/manifest.json: data/demo/tokenizer.model
	$(BIN)/tinyllama prepare stdlib --tokenizer $< --out data/demo

# Three workers for two cores, a file to a worker: some tests wait for processes that they started.
# By name: xdist would leave files of few tests to the end, among them the longest.
test: $(VENV)/installed-test
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

# Programs for GPUs that are not here: registers, spills, collectives. In an environment of its own:
# where the CUDA plugin is but no GPU, JAX complains at every start.
compile: $(VENV)-compile/installed
	$(VENV)-compile/bin/pytest -m compile

# The demo in llama.cpp, transformers and here. Compiles llama.cpp, once: about 7 minutes.
gguf-check: $(VENV)-gguf/installed runs/demo/export/model.safetensors
	$(VENV)-gguf/bin/pytest -m llama_cpp

# The minutes on a rented card, gone through on a CPU with the versions of such a machine.
rehearse: $(VENV)-card/installed wheels
	$(VENV)-card/bin/python -m benchmarks.card.rehearse

# What such a machine lacks, for its Python; it travels with the project.
wheels:
	@test -n "$(wildcard .wheels/*.whl)" || $(PYTHON) -m pip download --quiet --no-deps \
		--disable-pip-version-check --python-version 3.12 --only-binary=:all: --dest .wheels \
		--requirement benchmarks/card/wheels.txt

lint: $(VENV)/installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

$(VENV)/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
		"Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): about a minute, once."
	$(PIP) '.$(GPU)'
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@echo "Installing what the tests need, PyTorch and Apache Beam among it: once."
	$(PIP) '.[test,torch,beam]'
	@touch $@

$(VENV)-compile/installed: requirements.txt pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@echo "Installing the compiler for NVIDIA GPUs into $(@D) (about 560 MB of it): once."
	$(@D)/bin/pip install --quiet --disable-pip-version-check --editable '.[plan,test]'
	@touch $@

$(VENV)-gguf/installed: requirements.txt pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@echo "Installing into $(@D), and compiling llama.cpp (a C++ compiler is needed): once."
	$(@D)/bin/pip install --quiet --disable-pip-version-check --editable '.[test,torch]'
	$(@D)/bin/pip install --quiet --disable-pip-version-check 'llama-cpp-python>=0.3.36'
	@touch $@

$(VENV)-card/installed: benchmarks/card/requirements.txt
	@$(CARD_PYTHON) -c 'import sys; sys.exit(None if sys.version_info[:2] == (3, 12) else \
		"Python 3.12 is needed, as on the cards: make rehearse CARD_PYTHON=/path/to/python3.12")'
	test -x $(@D)/bin/python || $(CARD_PYTHON) -m venv $(@D)
	@echo "Installing what a card's machine has into $(@D), PyTorch for CUDA among it (5.8 GB): once."
	$(@D)/bin/pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-compile $(VENV)-gguf $(VENV)-card build data/demo runs/demo
