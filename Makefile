# `make demo` and `make test` set everything up in .venv on first use; PYTHON picks the interpreter it is made with.
PYTHON ?= python3
VENV = .venv/bin/python

.PHONY: demo test faults fuzz mutants lint bench docs clean
demo: .venv/.ready
	scripts/demo.sh

# Tests share the cores out, one thread each.
test: .venv/.ready
	OMP_NUM_THREADS=1 $(VENV) -m pytest -n auto --maxprocesses 8 --dist worksteal

# Real runs killed, starved and poisoned, and continued: about an hour on 2 idle cores, continues where it was stopped.
faults: .venv/.ready
	$(VENV) tests/faults/campaign.py --output runs/faults

# The tests of hostile options, images and checkpoints with 100 times the random examples.
fuzz: .venv/.ready
	FUZZ=100 $(VENV) -m pytest tests/utils/test_hostile_options.py tests/data/test_decode.py tests/models/test_archives.py

# 200 small wrong changes to the code, and which of them no test sees: about an hour on 2 idle cores, continues.
mutants: .venv/.ready
	OMP_NUM_THREADS=1 $(VENV) scripts/mutate.py attacks defenses models eval training --number 200 --seed 0

# Speed against the tools one would use instead, and one table of ratios, goals and verdicts. The attacks' part needs
# `.venv/bin/pip install breaching` and is left out without it. `make bench ROUNDS=2 BATCH=1` for a first look.
BENCH ?= runs/bench
BATCH ?= 8
turns = $(if $(ROUNDS),--rounds $(ROUNDS))
bench: .venv/.ready
	mkdir -p $(BENCH)
	$(VENV) -m benchmarks.training --batch $(BATCH) $(turns) --json $(BENCH)/training.json
	$(VENV) -m benchmarks.metrics $(turns) --json $(BENCH)/metrics.json
	$(VENV) -c "import breaching" || echo "attacks: breaching is not installed, only its comparisons are left out"
	$(VENV) -m benchmarks.attacks $(turns) --json $(BENCH)/attacks.json \
	    $$($(VENV) -c "import breaching" 2>/dev/null || echo --only dlg,gradvit,terms,overhead)
	$(VENV) -m benchmarks.hybrid $(turns) --json $(BENCH)/hybrid.json
	$(VENV) -m data.demo --output datasets
	$(VENV) -m benchmarks.pipeline $(turns) --images datasets/photographs --number 6 --json $(BENCH)/pipeline.json
	$(VENV) -m benchmarks.verdicts $(BENCH)/*.json

# API pages from the docstrings: docs/api/index.html
docs: .venv/.ready
	$(VENV) -m pdoc --output-directory docs/api attacks benchmarks campaigns data defenses eval models options reports training utils

lint: .venv/.ready
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	scripts/audit.sh $(VENV)

.venv/.ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv runs/demo datasets/digits datasets/photographs
