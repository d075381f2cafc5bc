# `make demo` and `make test` set everything up in .venv on first use; PYTHON picks the interpreter it is made with.
PYTHON ?= python3
VENV = .venv/bin/python

.PHONY: demo test lint bench clean
demo: .venv/.ready
	scripts/demo.sh

test: .venv/.ready
	$(VENV) -m pytest

# Speed against the tools one would use instead; the attacks' part needs `.venv/bin/pip install breaching`.
bench: .venv/.ready
	$(VENV) benchmarks/metrics.py
	$(VENV) -m benchmarks.attacks
	$(VENV) -m benchmarks.hybrid

lint: .venv/.ready
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .

.venv/.ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv runs/demo datasets/digits datasets/photographs
