# Targets for people; continuous integration calls `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A stamp named by pyproject's digest: set-up runs again when the dependencies change, and only then.
DIGEST := $(shell cksum < pyproject.toml | tr ' ' '-')
RUN_STAMP := $(VENV)/.run-$(DIGEST)
DEV_STAMP := $(VENV)/.dev-$(DIGEST)

.PHONY: setup demo demo-teacher test check docs bench clean

setup: $(DEV_STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A folder named dtpipe where one works would hide an editable install, but not a package on the path.
ON_PATH = import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "dtpipe.pth").write_text("$(CURDIR)/.dev")

$(RUN_STAMP): | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@$(BIN)/python -c '$(ON_PATH)'
	@touch $@

$(DEV_STAMP): | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@$(BIN)/python -c '$(ON_PATH)'
	@touch $@ $(RUN_STAMP)

demo: $(RUN_STAMP)          ## extract, verify, distill, score and report on digit scenes; goes on where it stopped
	$(BIN)/dtpipe demo

demo-teacher: $(RUN_STAMP)  ## train the demo's teacher again (about an hour on 2 cores)
	sh pipeline/demo/teacher/train.sh $(BIN)/dtpipe

test: $(DEV_STAMP)          ## everything that continuous integration runs
	$(MAKE) check
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(DEV_STAMP)         ## formatter, linter, type checker, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	MYPYPATH=.dev:benchmarks $(BIN)/mypy --strict -p dtpipe.manifests -p dtpipe.extract -p dtpipe.distill -p dtpipe.pipeline -m dtpipe -m dtpipe.__main__ $(patsubst benchmarks/%.py,-m %,$(wildcard benchmarks/*.py))
	$(BIN)/python -m pytest -q tests/test_layers.py

docs: $(DEV_STAMP)          ## the documents as a site: build/site/index.html
	$(BIN)/python -m sphinx -q -W --keep-going -b html -c docs/site . build/site

bench: $(DEV_STAMP)         ## every benchmark with its defaults (hours on 2 cores: probe.py trains on three seeds)
	@failed=; for script in $$(grep -l __main__ benchmarks/*.py); do echo "$$script"; \
	$(BIN)/python $$script || failed="$$failed $$script"; done; test -z "$$failed" || { echo "without result:$$failed"; exit 1; }

clean:
	rm -rf build dist demo-out .pytest_cache .mypy_cache .ruff_cache
