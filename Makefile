# Every target sets up .venv by itself; nothing is assumed but Python >= 3.10 with venv, and make.
#   make demo         inpainting on the shipped model; images in outputs/inpaint/
#   make test         all tests that need no GPU, in two processes (JOBS=4 make test: in four)
#   make lab          JupyterLab on the notebooks
#   make lint         ruff (notebooks included) and mypy
#   make train-mnist  train the MNIST model and the digit classifier anew, into runs/
#   make data-emoji   fetch and prepare the captioned images for configs/tiny, into data/
#   make data-lpips   fetch AlexNet's weights (64 MB), which LPIPS needs, into data/
#   make train-tiny   train the six tiny models one after the other, into runs/ and checkpoints/tiny/
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# Notebooks draw inline: a backend that the user has set would take the figures out of them. And only what is installed in .venv
# counts: another package named ldm in PYTHONPATH would be imported instead of this one.
unexport MPLBACKEND PYTHONPATH

.PHONY: demo test lab lint train-mnist data-emoji data-lpips train-tiny
.DEFAULT_GOAL := demo

$(READY): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python >= 3.10 with the venv module is needed; name one by: make PYTHON=/path/to/python3 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Setting up .venv (torch and friends: several GB, a few minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements.txt
	@touch $@

demo: $(READY)
	@mkdir -p outputs
	@$(BIN)/python -m papermill stable-diffusion/inpaint.ipynb outputs/inpaint.ipynb --cwd stable-diffusion
	@cat outputs/inpaint/summary.txt

# Two processes of one thread each: notebooks and small networks gain little from threads.
JOBS ?= 2
test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lab: $(READY)
	@$(BIN)/jupyter lab

lint: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet . && $(BIN)/mypy

train-mnist: $(READY)
	@$(BIN)/python -m ldm.train --config configs/mnist/classifier.yaml
	@$(BIN)/python -m ldm.train --config configs/mnist/unet.yaml

data-emoji: $(READY)
	@$(BIN)/python -m ldm.data.emoji

data-lpips: $(READY)
	@$(BIN)/python -m ldm.data.alexnet

train-tiny: data-emoji data-lpips
	@mkdir -p checkpoints/tiny
	@for model in autoencoder clip judge parser unet flow; do \
		$(BIN)/python -m ldm.train --config configs/tiny/$$model.yaml && \
		cp runs/tiny_$$model/weights.safetensors checkpoints/tiny/$$model.safetensors || exit 1; \
	done
