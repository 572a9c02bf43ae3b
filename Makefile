# make demo    set up .venv and let the embedded model write text (CPU, no GPU, no download of weights)
# make test    set up the test tools, then lint, types and the CPU test suite
# make test-gpu  the tests that need a CUDA GPU (set up with `make test-gpu TORCH_INDEX=` where torch has none)
# make lint    ruff and mypy alone
# make format  let ruff rewrite what it can
# make kernels compile the CUDA kernels for every target into dsv4/kernels/lib (needs nvcc, no GPU)
# make clean   remove caches and .venv

# The first interpreter that is new enough; override with `make demo PYTHON=/path/to/python`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
# On Linux the default torch wheel carries CUDA (gigabytes). The CPU index is asked first and skipped when it cannot be
# reached; `make demo TORCH_INDEX=` installs the default wheel instead.
TORCH_INDEX ?= $(if $(filter Linux,$(shell uname -s)),https://download.pytorch.org/whl/cpu)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --only-binary=:all:
# A stamp carries the checksum of what it installed: same pins, no second installation.
CORE := $(VENV)/.core-$(shell cat requirements/core.txt pyproject.toml | cksum | cut -d ' ' -f 1)
DEV := $(VENV)/.dev-$(shell cat requirements/core.txt requirements/dev.txt pyproject.toml | cksum | cut -d ' ' -f 1)

.PHONY: demo test test-gpu lint format kernels clean
.DELETE_ON_ERROR:

demo: $(CORE)
	printf 'def read(self, path):\n' | $(BIN)/dsv4 generate --prompt - --max-tokens 64
	$(BIN)/dsv4 generate --prompt "What is 12 + 30?" --chat --temperature 0

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal --durations 10

test-gpu: $(DEV)
	$(BIN)/python -m pytest -p no:xdist -p no:cacheprovider tests/gpu

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --output-format concise .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

kernels: $(CORE)
	$(BIN)/dsv4 kernels build

clean:
	rm -rf $(VENV) build dist dsv4/kernels/lib .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "dsv4 needs Python 3.11 or newer and found none on PATH;" \
		"install one, or name it: make demo PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit("dsv4 needs Python 3.11 or newer, but $(PYTHON) is %d.%d" % sys.version_info[:2] \
		if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(CORE): | $(BIN)/python
	@echo "installing the pinned packages of requirements/core.txt into $(VENV) (once; about a minute)"
	@$(if $(TORCH_INDEX),$(PIP) --no-deps --retries 1 --timeout 15 --index-url $(TORCH_INDEX) \
		$$(grep ^torch== requirements/core.txt) 2>/dev/null || echo "no CPU build of torch at hand: taking the default one")
	@$(PIP) -r requirements/core.txt
	@$(PIP) --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.core-* && touch $@

$(DEV): $(CORE)
	@echo "installing the test tools of requirements/dev.txt into $(VENV) (once)"
	@$(PIP) -r requirements/dev.txt
	@rm -f $(VENV)/.dev-* && touch $@
