# Everything runs in .venv, made on first use; PYTHON names the interpreter that makes it.
PYTHON ?= python3
BIN := .venv/bin
# Two processes share the files of tests; each has a Ray cluster of its own.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo install test test-slow test-models coverage lab docs check fuzz mutation bench clean

demo: .venv/installed ## Both methods on a world small enough for a laptop, offline
	$(BIN)/python -m rayjobs demo

install: .venv/installed ## Only the environment

test: .venv/installed-test ## The tests that say that everything works
	$(PYTEST)

test-slow: .venv/installed-test ## The tests that take long: more faults, a bucket, the commands of the documents, pretrained models
	$(PYTEST) -m slow --verbose

test-models: .venv/installed-test ## Fetches the pretrained models of make test-slow, 120 MB; it does so itself otherwise
	$(BIN)/python -m tests.real_models

coverage: .venv/installed-test ## All tests, and which lines they do not reach
	$(PYTEST) -m "slow or not slow" --durations=30 --cov=adapter --cov=cafo --cov=rayjobs --cov-report=term-missing:skip-covered

lab: .venv/installed-test ## A cluster of several hosts on this machine, and what fails on it; MINUTES=60 adds random faults; as root, with sshd, ip and rsync
	$(BIN)/python -m pytest tests/cluster_lab
	$(if $(MINUTES),$(BIN)/python -m tests.cluster_lab.random_faults --minutes $(MINUTES))

docs: .venv/installed-test ## The documentation site, build/site/index.html; a broken link or anchor is an error
	$(BIN)/python docs/build_site.py

check: .venv/installed-test ## What CI runs: lint, format, types, documentation, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) docs test

fuzz: .venv/installed-test ## Every reader on damaged files: N=100000 inputs; GUIDED=1 lets atheris choose them
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(or $(N),100000) $(if $(GUIDED),--guided)

mutation: .venv/installed-test ## The core's tests on small faults in its files: all, or COUNT=50 of each; installs cosmic-ray
	$(BIN)/python -m pip install --quiet --constraint constraints.txt cosmic-ray==8.7.0
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation $(if $(COUNT),--count $(COUNT))

bench: .venv/installed-test ## The benchmarks; BASE=folder DATA=records.json TOKENIZER=tokenizer.model adds training
	$(BIN)/python -m benchmarks.cafo_search --json
	$(BIN)/python -m benchmarks.cafo_large_search --classes 200 --images 5000 --check
	$(BIN)/python -m benchmarks.cafo_sweep --json
	$(BIN)/python -m benchmarks.features --json
	$(BIN)/python -m benchmarks.growth --json
	$(BIN)/python -m benchmarks.step_memory --json
	$(BIN)/python -m benchmarks.decoding --json
	$(BIN)/python -m benchmarks.serving_adapters --json
	$(BIN)/python -m benchmarks.serving_load --json
	$(if $(and $(DATA),$(TOKENIZER)),$(BIN)/python -m benchmarks.adapter_step --data $(DATA) --tokenizer $(TOKENIZER) --json)
	$(if $(BASE),$(BIN)/python -m benchmarks.startup --base $(BASE) --data $(DATA) --json)
	$(if $(BASE),$(BIN)/python -m benchmarks.bf16_losses --base $(BASE) --data $(DATA) --json)

clean: ## What was built, not what was run: runs/ stays
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

.venv/installed-test: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,test]'
	touch .venv/installed $@
