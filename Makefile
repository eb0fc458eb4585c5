# Two commands: `make demo` and `make test`. Each sets up .venv first; nothing but Python 3.11 is needed.
PYTHON ?= python3.11
BIN = .venv/bin
INSTALLED = .venv/.installed
DEMO = runs/demo

.PHONY: demo test test-slow test-gpu lint format clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# Without torchvision: beside a torch of another index it does not import, and diffusers then does not either.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps torch-fidelity
	touch $@

demo: $(INSTALLED)  ## train MuLAN on digits, evaluate, sample, report: about ten minutes on two cores
	$(BIN)/nelbo train mulan-digits --out $(DEMO)
	test $(DEMO)/evaluations/test-best-ema-vlb-16x2.json -nt $(DEMO)/run.json || $(BIN)/nelbo evaluate $(DEMO)
	test $(DEMO)/evaluations/test-best-ema-ode-truncated-normal-1x2-adams4-224-0.001-64.json -nt $(DEMO)/run.json || $(BIN)/nelbo evaluate $(DEMO) --method ode --images 64
	test $(DEMO)/samples/best.png -nt $(DEMO)/run.json || $(BIN)/nelbo sample $(DEMO) --count 100 --out $(DEMO)/samples/best
	$(BIN)/nelbo report $(DEMO)

test: $(INSTALLED)  ## everything but the tests marked slow: minutes, on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not gpu'

test-slow: $(INSTALLED)  ## the slow ones too
	$(BIN)/python -m pytest -m 'not gpu'

test-gpu: $(INSTALLED)  ## those that need a GPU, where there is one
	$(BIN)/python -m pytest -m gpu

lint: $(INSTALLED)  ## style, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist src/*.egg-info
