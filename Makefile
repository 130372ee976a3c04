PYTHON ?= python3
# accelerate launch gives a process one thread unless it is told; a small model has no use for more than four.
THREADS ?= $(shell $(PYTHON) -c "import os; print(min(4, os.cpu_count()))")
LAUNCH = .venv/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    --num_cpu_threads_per_process $(THREADS)

.PHONY: demo demo-lora demo-dreambooth demo-textual-inversion demo-unconditional demo-controlnet demo-instruct-pix2pix \
    test test-all quality style sync clean

# What the base and a result draw of some prompts, into $(2)/$(1): $(call draw,PROMPTS,OUTPUT_DIR)
draw = $(LAUNCH) generate.py --model demo/base --compare $(2) --prompts demo/prompts/$(1).txt \
    --num_images_per_prompt 4 --num_inference_steps 25 --batch_size 8 --output_dir $(2)/$(1)
# Whether the result's fit their prompts better or worse than the base's, or are more like the subject
score = $(LAUNCH) evaluate.py --clip_model demo/clip --images $(2)/$(1)/pictures --compare $(2)/$(1)/compare \
    --output_dir $(2)/$(1)
rows = before=outputs/$(2)/$(1)/pictures,outputs/$(2)/shapes/pictures after=outputs/$(2)/$(1)/compare,outputs/$(2)/shapes/compare

demo: .venv/.installed
	$(LAUNCH) train_text_to_image.py --config configs/demo_text_to_image.yaml --overwrite_output_dir $(DEMO_FLAGS)
	rm -rf outputs/demo/emoji outputs/demo/shapes outputs/demo.safetensors
	$(call draw,emoji,outputs/demo)
	$(call draw,shapes,outputs/demo)
	.venv/bin/python export.py outputs/demo outputs/demo.safetensors --dtype fp16
	$(call score,emoji,outputs/demo)
	$(call score,shapes,outputs/demo)
	.venv/bin/python demo/show.py outputs/demo $(call rows,emoji,demo)

demo-dreambooth: .venv/.installed
	$(LAUNCH) train_dreambooth.py --config configs/demo_dreambooth.yaml --overwrite_output_dir $(DEMO_FLAGS)
	rm -rf outputs/demo-dreambooth/sks outputs/demo-dreambooth/shapes
	$(call draw,sks,outputs/demo-dreambooth)
	$(call draw,shapes,outputs/demo-dreambooth)
	$(call score,sks,outputs/demo-dreambooth) --metrics clip_i --reference demo/subject
	$(call score,shapes,outputs/demo-dreambooth)
	.venv/bin/python demo/show.py outputs/demo-dreambooth learned=demo/subject $(call rows,sks,demo-dreambooth)

demo-unconditional: .venv/.installed
	$(LAUNCH) train_unconditional.py --config configs/demo_unconditional.yaml --overwrite_output_dir $(DEMO_FLAGS)
	rm -rf outputs/demo-unconditional/drawn
	$(LAUNCH) generate.py --model outputs/demo-unconditional --num_images_per_prompt 40 --batch_size 20 \
	    --num_inference_steps 100 --output_dir outputs/demo-unconditional/drawn
	$(LAUNCH) evaluate.py --clip_model demo/clip --images outputs/demo-unconditional/drawn/pictures \
	    --metrics kid --reference demo/pictures --output_dir outputs/demo-unconditional/drawn
	.venv/bin/python demo/show.py outputs/demo-unconditional pictures=demo/pictures \
	    drawn=outputs/demo-unconditional/drawn/pictures

demo-textual-inversion: .venv/.installed
	$(LAUNCH) textual_inversion.py --config configs/demo_textual_inversion.yaml --overwrite_output_dir $(DEMO_FLAGS)
	rm -rf outputs/demo-textual-inversion/pig outputs/demo-textual-inversion/shapes
	$(call draw,pig,outputs/demo-textual-inversion) --guidance_scale 4
	$(call draw,shapes,outputs/demo-textual-inversion)
	$(call score,pig,outputs/demo-textual-inversion) --metrics clip_i --reference demo/subject
	$(call score,shapes,outputs/demo-textual-inversion)
	.venv/bin/python demo/show.py outputs/demo-textual-inversion learned=demo/subject \
	    $(call rows,pig,demo-textual-inversion)

demo-lora: .venv/.installed
	$(LAUNCH) train_lora.py --config configs/demo_lora.yaml --overwrite_output_dir $(DEMO_FLAGS)
	rm -rf outputs/demo-lora/sks outputs/demo-lora/shapes outputs/demo-lora.safetensors
	$(call draw,sks,outputs/demo-lora)
	$(call draw,shapes,outputs/demo-lora)
	.venv/bin/python export.py outputs/demo-lora outputs/demo-lora.safetensors --merge_lora --dtype fp16
	$(call score,sks,outputs/demo-lora) --metrics clip_i --reference demo/subject
	$(call score,shapes,outputs/demo-lora)
	.venv/bin/python demo/show.py outputs/demo-lora learned=demo/subject $(call rows,sks,demo-lora)

PAIRS ?= 500
# A set of pairs to train on, and one to draw from: $(call pairs,KIND,FOLDER)
define pairs
rm -rf $(2) $(2)-new
.venv/bin/python demo/make_pairs.py $(1) $(2) --count $(PAIRS)
.venv/bin/python demo/make_pairs.py $(1) $(2)-new --count 24 --seed 1
endef

demo-controlnet: .venv/.installed
	$(call pairs,outlines,outputs/outlines)
	$(LAUNCH) train_controlnet.py --config configs/demo_controlnet.yaml --overwrite_output_dir $(DEMO_FLAGS)
	rm -rf outputs/demo-controlnet/drawn outputs/demo-controlnet/before
	$(LAUNCH) generate.py --model outputs/demo-controlnet --prompts outputs/outlines-new/prompts.jsonl \
	    --num_inference_steps 25 --batch_size 8 --output_dir outputs/demo-controlnet/drawn
	$(LAUNCH) generate.py --model demo/base --prompts outputs/outlines-new/prompts.txt --height 64 --width 64 \
	    --num_inference_steps 25 --batch_size 8 --output_dir outputs/demo-controlnet/before
	.venv/bin/python demo/measure_pairs.py outputs/outlines-new outputs/demo-controlnet/before/pictures \
	    outputs/demo-controlnet/drawn/pictures
	.venv/bin/python demo/show.py outputs/demo-controlnet outline=outputs/outlines-new/outlines \
	    drawn=outputs/demo-controlnet/drawn/pictures

demo-instruct-pix2pix: .venv/.installed
	$(call pairs,edits,outputs/edits)
	$(LAUNCH) train_instruct_pix2pix.py --config configs/demo_instruct_pix2pix.yaml --overwrite_output_dir $(DEMO_FLAGS)
	rm -rf outputs/demo-instruct-pix2pix/drawn
	$(LAUNCH) generate.py --model outputs/demo-instruct-pix2pix --prompts outputs/edits-new/prompts.jsonl \
	    --num_inference_steps 25 --batch_size 8 --output_dir outputs/demo-instruct-pix2pix/drawn
	.venv/bin/python demo/measure_pairs.py outputs/edits-new outputs/demo-instruct-pix2pix/drawn/pictures
	.venv/bin/python demo/show.py outputs/demo-instruct-pix2pix before=outputs/edits-new/before \
	    after=outputs/demo-instruct-pix2pix/drawn/pictures

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
