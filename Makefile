# `make demo` and `make test` need python3 >= 3.11, a C++ compiler and make; they build .venv.
PYTHON ?= python3
BIN := .venv/bin
# what the tests of a wheel read; tests/test_layout.py and test_wheel.py are about the tree itself
FOR_TESTS := tests examples benchmarks docs pyproject.toml mkdocs.yml README.md CONTRIBUTING.md

.PHONY: demo test test-all coverage lint docs wheel test-wheel clean

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch setuptools
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[demo,lightning,dev]'
	touch $@

demo: .venv/ready
	$(BIN)/python -m examples.demo $(ARGS)

test: .venv/ready lint
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m 'not full' $(ARGS)

test-all: .venv/ready lint
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(ARGS)

# of the tests that `make test` runs, and of those with DeepSpeed, by folder; below 85 % it fails
coverage: .venv/ready
	$(BIN)/python -m pip install -q -c constraints.txt coverage
	$(BIN)/python -m coverage erase
	TRITON_INTERPRET=1 $(BIN)/python -m coverage run -m pytest -m 'not full' $(ARGS)
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[deepspeed]'
	$(BIN)/python -m coverage run -m pytest tests/distributed/test_deepspeed.py \
	    tests/integrations/test_lightning_deepspeed.py
	$(BIN)/python -m coverage combine -q
	for folder in magi_train comm fusion memory integrations; do \
	    $(BIN)/python -m coverage report --include="$$folder/*" --fail-under=85 || exit; done

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/ready
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# into dist/: a wheel and an sdist, the wheel built from the sdist
wheel: .venv/ready
	$(BIN)/python -m pip install -q -c constraints.txt build
	$(BIN)/python -m build --no-isolation --outdir dist .

# in a fresh environment, from another folder; TORCH=2.15.0 takes that version of torch
test-wheel: wheel
	set -e; new=$$(mktemp -d); trap 'rm -rf "$$new"' EXIT; unset PYTHONPATH; \
	sed -e '$(if $(TORCH),s/^torch==.*/torch==$(TORCH)/;/^triton==/d)' constraints.txt > "$$new/pins"; \
	$(PYTHON) -m venv "$$new/venv"; python="$$new/venv/bin/python"; \
	wheel=$$(ls -t dist/magi_train-*.whl | head -1); \
	"$$python" -m pip install -q -c "$$new/pins" "$$wheel[demo,lightning,dev]"; \
	mkdir "$$new/elsewhere"; cp -r $(FOR_TESTS) "$$new/elsewhere"; cd "$$new/elsewhere"; \
	rm tests/test_layout.py tests/test_wheel.py; \
	"$$python" -c 'import magi_train, sys; f = magi_train.__file__; print(f); sys.exit(sys.prefix not in f)'; \
	TRITON_INTERPRET=1 "$$python" -m pytest -m 'not full' $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info
