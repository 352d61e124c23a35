# make quickstart   install, then train, compare and report on the embedded model
# make docs         build the documentation into build/site
# make test         install with the tools of development, then every check
PYTHON ?= python3
OUT ?= $(shell d=runs/quickstart; n=2; while [ -e $$d ]; do d=runs/quickstart-$$n; n=$$((n + 1)); done; echo $$d)

# glibc hands large blocks back to the kernel after every step; where page faults are dear, keeping them halves step time.
export MALLOC_MMAP_THRESHOLD_ = 8589934592
export MALLOC_TRIM_THRESHOLD_ = 17179869184
# Bytecode is written when a module is first imported: to compile all 27,000 of them beforehand takes a minute.
PIP = .venv/bin/python -m pip install --no-compile --constraint constraints.txt

.PHONY: quickstart docs test

quickstart: .venv/installed
	.venv/bin/smartmops quickstart --out $(OUT)

docs: .venv/installed-dev
	.venv/bin/python scripts/site/write.py --check
	.venv/bin/python -m mkdocs build --strict --quiet

test: .venv/installed-dev
	scripts/check

# torch first and alone: whatever else wants a torch then finds this one, not a build for another machine.
.venv/installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[report]'
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --editable '.[dev]'
	touch $@
