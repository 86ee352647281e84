# Every target sets itself up: `make demo` and `make test` work in a fresh clone with Python and git only.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= runs/demo

.PHONY: install demo test test-all bench lint clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt \
		-e '.[all,dev]'
	touch $@

demo: install
	$(BIN)/mmforget run suite=vision/demo --runs $(DEMO) --report $(DEMO)/report.html
	$(BIN)/mmforget run suite=recsys/demo --runs $(DEMO)-recsys --report $(DEMO)-recsys/report.html
	$(BIN)/mmforget run suite=diffusion/demo --runs $(DEMO)-diffusion --report $(DEMO)-diffusion/report.html
	$(BIN)/mmforget run suite=vlm/demo --runs $(DEMO)-vlm --report $(DEMO)-vlm/report.html

test: install
	$(BIN)/python -m pytest -q

test-all: install
	$(BIN)/python -m pytest -q -m "not gpu and not network and not reproduce"

bench: install
	$(BIN)/python -m tests.bench.vision
	$(BIN)/python -m tests.bench.recsys
	$(BIN)/python -m tests.bench.diffusion
	$(BIN)/python -m tests.bench.diffusion_attacks
	$(BIN)/python -m tests.bench.vlm

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info
