# One-line commands; each makes the environment that it needs.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-lowest lint bench clean

demo: $(VENV)/.ready  ## restore the photos in inputs/demo
	$(RUN) inference.py --input inputs/demo --output outputs/demo --save-stages
	@echo "Look at outputs/demo/ (results) and outputs/demo/stages/ (input, stage 1 and result side by side)."

test: $(VENV)/.ready-test weights/vgg16.safetensors weights/brisque.safetensors  ## all tests, in two processes
	$(RUN) -m pytest -n 2 --dist worksteal

test-lowest: $(VENV)-lowest/.ready  ## all tests with the lowest versions allowed; Python 3.10 or 3.11
	$(VENV)-lowest/bin/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.ready-test  ## style
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(VENV)/.ready-test weights/vgg16.safetensors  ## quality on synthetic pairs; PHOTOS is any folder of clean photos
	$(RUN) benchmarks/quality.py --input $(PHOTOS)

$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the requirements (some minutes the first time) ..."
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready pyproject.toml
	@echo "Installing what the tests need ..."
	$(RUN) -m pip install --quiet --disable-pip-version-check '.[test]'
	@touch $@

weights/vgg16.safetensors: | $(VENV)/.ready-test
	@echo "Fetching VGG16 for DISTS (64 MB, once; without a network what needs it is left out) ..."
	-@$(RUN) scripts/convert_weights.py --vgg16

weights/brisque.safetensors: | $(VENV)/.ready-test
	-@$(RUN) scripts/convert_weights.py --brisque

$(VENV)-lowest/.ready: requirements.txt tests/lowest.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-lowest
	@echo "Installing the lowest versions (some minutes the first time) ..."
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c tests/lowest.txt '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest outputs
