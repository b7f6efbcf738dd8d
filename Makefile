# Every target sets up .venv first when it has to: `make demo` and `make test` work on a fresh clone.

VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
PIP := $(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Nothing is downloaded once .venv stands.
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help demo test versions check lint types docs bench fetched clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s  %s\n", $$1, $$2 }' Makefile

# A finished demo is replaced, an interrupted one continued.
demo: $(INSTALLED) ## all three stages on the grid world, from nothing to runs/demo/report.html
	@$(VENV)/bin/internalrl demo --run runs/demo $(if $(wildcard runs/demo/summary.json),--overwrite,$(if \
		$(wildcard runs/demo/config.json),--resume))

test: $(INSTALLED) fetched ## run the tests; ARGS="-k name" chooses
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 $(ARGS)

versions: $(INSTALLED) ## what must hold with every admitted release, with the oldest and the newest, in .versions
	@OMP_NUM_THREADS=1 $(PYTHON) tools/versions.py $(ARGS)

check: lint types docs ## lint, types and the commands and links in the documentation

lint: $(INSTALLED) ## ruff
	@$(PYTHON) -m ruff check .

types: $(INSTALLED) ## mypy
	@$(PYTHON) -m mypy

docs: $(INSTALLED)
	@$(PYTHON) tools/check_docs.py

# Those that need no model to begin with, the longest last.
BENCHMARKS := demonstrations discovery_step steered_decoding sandbox serving serving_load demo code_base code_discovery grid

bench: $(INSTALLED) ## run the benchmarks; they write benchmarks/results
	@for name in $(BENCHMARKS); do echo "$$name"; $(PYTHON) "benchmarks/$$name.py" || exit 1; done

clean: ## remove .venv, .versions and caches; runs/ stays
	rm -rf $(VENV) .versions build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The pages are tested where a browser is found, databases where a PostgreSQL server is, the proxy where nginx is; on CI they
# are worth fetching.
fetched:
	@missing=; command -v chromium >/dev/null || missing=chromium; \
	ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing="$$missing postgresql"; \
	command -v nginx >/dev/null || ls /usr/sbin/nginx >/dev/null 2>&1 || missing="$$missing nginx openssl sqlite3"; \
	if [ -n "$$missing" ] && [ "$$CI" = true ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		(apt-get update && apt-get install -y --no-install-recommends $$missing) >/dev/null 2>&1 \
			|| echo "$$missing could not be installed; what needs them will be skipped"; \
	fi

# torch first: it is the largest by far, and brings the setuptools that the build below uses without isolation.
$(INSTALLED): pyproject.toml constraints.txt
	@for candidate in python3 python3.14 python3.13 python3.12 python3.11; do \
		if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			found=$$candidate; break; \
		fi; \
	done; \
	if [ -z "$$found" ]; then echo "Python 3.11 or newer is needed; install it and try again." >&2; exit 1; fi; \
	if ! $(PYTHON) -m pip --version >/dev/null 2>&1; then \
		echo "Creating $(VENV) with $$found"; $$found -m venv --clear $(VENV) || exit 1; \
	fi
	@echo "Installing into $(VENV); once, some minutes"
	@$(PIP) torch==2.13.0 setuptools
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@
