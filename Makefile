# make demo: fine-tune the bundled model with HiZOO.   make test: lint, format check and tests.
# make test-all: the slow tests too. Each installs what it needs into .venv first, once.

PYTHON ?= python3
VENV_PATH = PATH="$(CURDIR)/.venv/bin:$$PATH"

.PHONY: demo test test-all clean

demo: .venv/demo-installed
	$(VENV_PATH) bash HiZOO.sh --overwrite_output_dir

# A test that ends its process would leave pytest-xdist waiting; without a new process it is named.
test: PYTEST_ARGUMENTS = -m "not slow"
test test-all: .venv/test-installed
	$(VENV_PATH) ruff check .
	$(VENV_PATH) ruff format --check .
	$(VENV_PATH) python -m pytest -q -n 2 --dist loadgroup --max-worker-restart 0 \
		$(PYTEST_ARGUMENTS)

# Says that make has made .venv; another one is neither used nor removed.
MARK = .venv/made-by-make

$(MARK):
	@if [ -e .venv ]; then echo "error: make has not made .venv (it has no $(@F)): remove it, or go" \
	    "without make: pip install -r requirements.txt" >&2; exit 2; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python %d.%d, \
	older than 3.11: name a newer one, as in PYTHON=python3.12" % sys.version_info[:2])'
	@mkdir .venv
	@touch $@

# pip comes last into an environment: without it the environment is not whole.
.venv/bin/pip: | $(MARK)
	$(PYTHON) -m venv .venv || { code=$$?; rm -rf .venv; exit $$code; }

.venv/demo-installed: requirements.txt | .venv/bin/pip
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

.venv/test-installed: requirements.txt requirements-test.txt | .venv/bin/pip
	.venv/bin/python -m pip install -q -r requirements-test.txt
	touch $@

clean:
	@if [ -e .venv ] && [ ! -e $(MARK) ]; then echo "make has not made .venv: it stays" >&2; \
	else rm -rf .venv; fi
