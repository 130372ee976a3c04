PYTHON ?= python3
# accelerate launch gives a process one thread unless it is told; a small model has no use for more than four.
THREADS ?= $(shell $(PYTHON) -c "import os; print(min(4, os.cpu_count()))")
LAUNCH = .venv/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    --num_cpu_threads_per_process $(THREADS)

.PHONY: demo demo-lora demo-dreambooth demo-textual-inversion demo-unconditional test test-all quality style sync clean

demo: .venv/.installed
	$(LAUNCH) train_text_to_image.py --config configs/demo_text_to_image.yaml --overwrite_output_dir $(DEMO_FLAGS)
	.venv/bin/python demo/before_after.py outputs/demo

demo-dreambooth: .venv/.installed
	$(LAUNCH) train_dreambooth.py --config configs/demo_dreambooth.yaml --overwrite_output_dir $(DEMO_FLAGS)
	.venv/bin/python demo/before_after.py outputs/demo-dreambooth --prompts "a sks on a blue background" \
	    "a sks on a green background" "a sks on a red background" "a sks" "a red star on a white background" \
	    "a green circle on a yellow background"

demo-unconditional: .venv/.installed
	$(LAUNCH) train_unconditional.py --config configs/demo_unconditional.yaml --overwrite_output_dir $(DEMO_FLAGS)
	.venv/bin/python demo/grids.py outputs/demo-unconditional

demo-textual-inversion: .venv/.installed
	$(LAUNCH) textual_inversion.py --config configs/demo_textual_inversion.yaml --overwrite_output_dir $(DEMO_FLAGS)
	.venv/bin/python demo/new_word.py outputs/demo-textual-inversion

demo-lora: .venv/.installed
	$(LAUNCH) train_lora.py --config configs/demo_lora.yaml --overwrite_output_dir $(DEMO_FLAGS)
	.venv/bin/python demo/lora_scales.py outputs/demo-lora

test: .venv/.installed-dev
	.venv/bin/python -m pytest -n 2 --dist loadfile

test-all: .venv/.installed-dev
	.venv/bin/python -m pytest -n 2 --dist loadfile -m ""

quality: .venv/.installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest tests/docs/test_fences.py tests/docs/test_commands.py

style: .venv/.installed-dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# make sync, or make sync FENCE="Engine" FROM=train_text_to_image.py
sync: .venv/.installed
	.venv/bin/python tools/sync.py $(if $(FENCE),"$(FENCE)" $(FROM))

clean:
	rm -rf .venv .pytest_cache .ruff_cache outputs

.venv/.installed: requirements-exact.txt
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))" || \
	    { echo "Python 3.11 to 3.14 is needed: make PYTHON=/path/to/python3.12"; exit 1; }
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -r requirements-exact.txt
	touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.txt
	.venv/bin/python -m pip install -r requirements-dev.txt
	touch $@
