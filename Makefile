# One command each; CI runs the same ones.
VENV := .venv
PY := $(VENV)/bin/python
PROTOS := $(shell find protos -name '*.proto' | sort)

.PHONY: setup generate check test test-split demo bench crash-test clean

# Installs what is needed by name and creates .venv; running it again changes nothing.
setup:
	@./setup.sh

generate: setup
	@$(PY) protos/generate.py
	@$(PY) cli/generate_sync.py

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(PY) protos/generate.py --check
	$(PY) cli/generate_sync.py --check

test: setup
	$(PY) -m pytest tests $(PYTEST_ARGS)

demo: setup
	@$(PY) tests/e2e/demo.py

bench: setup
	@$(PY) -m corral.runtime.launcher .venv/bin/corral-oci    # what it reads is out of date once a source was changed
	@$(PY) tests/bench/bench.py

crash-test: setup
	@$(PY) tests/e2e/crash_test.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
