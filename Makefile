# make demo     train, sample and score a small diffusion model on the bundled digits
# make check    the fast half of the tests, for work in progress
# make test     the whole test suite
# make faults   runs that are killed, fill the disk or take several processes (docs/reliability.md)
# make newest   the tests on the newest releases, without constraints.txt; they may fail, and the result is printed
# make lint     the linter
# make docs     the documentation as a site, in site/; a broken link is an error
# Each sets up .venv first, once. Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

# Each process would compile all that it imports, for 3 s, where bytecode is not to be written.
export PYTHONDONTWRITEBYTECODE :=

# A worker that crashes is not replaced: the new one may wait for ever (pytest-xdist issue 1327).
PYTEST := $(VENV)/bin/python -m pytest --numprocesses=auto --dist=loadfile --max-worker-restart=0

.PHONY: demo check test faults newest lint docs

demo: $(VENV)/.installed
	$(VENV)/bin/python main.py --config=configs/digits.py --workdir=runs/digits

# The paper's modules, data, metrics, published weights and the runtime; `make test` runs the other folders, too.
check: $(VENV)/.installed-dev
	$(PYTEST) tests/test_*.py tests/data tests/evaluation tests/interop tests/runtime

test: $(VENV)/.installed-dev
	$(PYTEST) --durations=15

faults: $(VENV)/.installed-dev
	$(VENV)/bin/python tests/faults/bad_configs.py 20
	$(VENV)/bin/python tests/faults/disk_full.py
	$(VENV)/bin/python tests/faults/every_io.py --number=20
	$(VENV)/bin/python tests/faults/no_reader.py
	$(VENV)/bin/python tests/faults/decoding.py 10
	$(VENV)/bin/python tests/faults/several_processes.py --toy
	$(VENV)/bin/python tests/faults/kills.py 3

# An environment of its own, made anew each time. What fails here fails for users next; it is no failure of today.
newest:
	rm -rf $(VENV)-newest && $(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -e '.[dev]'
	$(VENV)-newest/bin/python -m pip list | grep -E '^(jax|jaxlib|flax|optax|orbax-checkpoint|numpy|tensorflow-datasets|pillow) '
	@$(VENV)-newest/bin/python -m pytest --numprocesses=auto --dist=loadfile --max-worker-restart=0 && \
		echo "newest releases: the tests pass" || echo "newest releases: the tests FAIL (see above)"

lint: $(VENV)/.installed-dev
	$(VENV)/bin/python -m ruff check .

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict
	@echo "site/index.html; to search, too: $(VENV)/bin/python -m http.server --directory site"

# Not compiling every module to bytecode up front makes the set-up faster; what is imported is compiled then.
$(VENV)/.installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "diffusion needs Python 3.11 or newer, but $(PYTHON) is `$(PYTHON) --version 2>&1`;" \
		"name another one: make PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV) (once, about a minute)"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP_INSTALL) -e '.[docs]'
	@touch $@
