# make demo: fine-tune the bundled model with HiZOO.   make test: lint, format check and tests.
# Both install what they need into .venv first, once.

PYTHON ?= python3
VENV_PATH = PATH="$(CURDIR)/.venv/bin:$$PATH"

.PHONY: demo test clean

demo: .venv/demo-installed
	$(VENV_PATH) bash HiZOO.sh --overwrite_output_dir

test: .venv/test-installed
	$(VENV_PATH) ruff check .
	$(VENV_PATH) ruff format --check .
	$(VENV_PATH) python -m pytest -q -n 2

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo-installed: requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

.venv/test-installed: requirements.txt requirements-test.txt | .venv/bin/python
	.venv/bin/python -m pip install -q -r requirements-test.txt
	touch $@

clean:
	rm -rf .venv
