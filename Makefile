# `make demo` and `make test` set up everything they need in .venv, from a package index alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# What the demo's last checkpoint is held to. The quiz and the text are files of this repository, so that they are the same
# under every Python; the calibration text is not, and the limits leave room for that (see baselines/README.md).
MEASURED := --mmlu calib_data/quiz --text calib_data/quiz_prompts.jsonl --samples 48 --sequence-length 256 \
	--against reference_model/checkpoint
LIMITS := --max-drop 5 --max-perplexity-increase 10 --min-agreement 80
EVALUATE = $(BIN)/autoglm-compress evaluate "$$(ls -d runs/demo/*-int4 | tail -n 1)" $(MEASURED)

.PHONY: demo gate baseline test lint clean

demo: $(READY)
	$(BIN)/autoglm-compress run recipes/demo.yaml --output runs/demo
	$(BIN)/python reference_model/say.py runs/demo/*-gguf/demo-*.gguf "Return the number of items in a container."

# Undecided (exit code 3) passes: the quiz is too short to prove small changes either way.
gate: demo
	$(EVALUATE) --output runs/demo-int4.json
	$(BIN)/autoglm-compress compare baselines/demo-int4.json runs/demo-int4.json $(LIMITS) \
		--markdown runs/gate.md --junit runs/gate.xml || [ $$? -eq 3 ]

baseline: demo
	$(EVALUATE) --output baselines/demo-int4.json

test: lint
	$(BIN)/python -m pytest -n auto

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs
