# Every target makes the virtual environment and installs by itself.
#   make train ARGS="loss=softmax_nll seed=1"
#   make test
#   make test-slow
#   make faults
#   make moments
#   make fuzz
#   make ray
#   make loggers
#   make invariance
#   make bench ARGS=loss
#   make pictures
#   make lock
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
# Two test processes, a thread each: two pools of threads on the same cores are far slower.
JOBS ?= 2

.PHONY: train test test-slow faults moments fuzz ray loggers lint invariance bench pictures lock \
	lock-check clean

train: $(VENV)/train.stamp
	$(BIN)/python train.py $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-slow: $(VENV)/dev.stamp
	$(BIN)/python -m pip install --quiet --editable '.[dev,oracles]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow $(ARGS)

# One fault after the other on real processes, and the table of docs/faults.md.
faults: $(VENV)/dev.stamp
	rm -f faults.jsonl
	EQUILOSS_FAULTS=$(CURDIR)/faults.jsonl OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n $(JOBS) -m faults tests/faults $(ARGS)
	$(BIN)/python tests/faults/table.py faults.jsonl docs/faults.md
	rm -f faults.jsonl

# Two hundred kills and three hundred signals, at moments drawn by a seed.
moments: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m moments tests/faults $(ARGS)

# Hostile command lines and files by the thousand, and fifty runs in one process.
fuzz: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m fuzz tests/fuzz $(ARGS)

# Ray's launcher wants an older cloudpickle than joblib's: an environment of its own.
ray:
	$(PYTHON) -m venv $(VENV)-ray
	$(VENV)-ray/bin/python -m pip install --quiet --editable '.[ray]' pytest
	OMP_NUM_THREADS=1 $(VENV)-ray/bin/python -m pytest -m ray tests/launching/test_ray.py $(ARGS)

loggers: $(VENV)/dev.stamp
	$(BIN)/python -m pip install --quiet --editable '.[dev,wandb,mlflow]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m loggers tests/records/test_trackers.py $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The table and the picture of docs/invariance.md.
invariance: $(VENV)/train.stamp
	$(BIN)/equiloss verify invariance --output docs

# Timings side by side; all of them together are written into docs/performance.md.
bench: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks $(or $(ARGS),--write)

# The pictures of the README and docs/, from a real sweep (needs Debian's chromium, chromium-driver).
pictures: $(VENV)/dev.stamp
	$(BIN)/python docs/pictures.py

# What `make test` installs, with hashes; and whether what the index has is still that.
lock: $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --dry-run --ignore-installed \
		--report $(VENV)/report.json '.[dev]'
	$(BIN)/python .ci/lock.py $(VENV)/report.json requirements.lock

lock-check: $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --dry-run --ignore-installed --no-deps \
		--require-hashes --requirement requirements.lock

clean:
	rm -rf $(VENV) $(VENV)-ray build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/train.stamp: pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV): the first time some minutes and several GB"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/dev.stamp: pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV): the first time some minutes and several GB"
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/train.stamp
