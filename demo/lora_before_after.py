"""Draws prompts with the base model and with a LoRA at rising scales, from the same seeds, into one picture.

python demo/lora_before_after.py [OUTPUT_DIR]
"""

import json
import logging
import os
import sys
import textwrap
from pathlib import Path

import yaml


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm


# The subject on what it was trained on and on what it never was, and two of the base's own.
PROMPTS = ["a sks on a blue background", "a sks on a yellow background", "a sks on a red background"]
PROMPTS += ["a red circle on a blue background", "a green square on a yellow background"]
SIDE = 128  # pixels of a picture on the sheet
MARGIN = 110  # for the row's name


def draw(pipeline: StableDiffusionPipeline, name: str, side: int) -> list[Image.Image]:
    """Draws one picture a prompt; prompt i always starts from the noise of seed i."""
    settings = {"height": side, "width": side, "num_inference_steps": 25}
    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    prompts = tqdm(zip(PROMPTS, generators), f"drawing with {name}", len(PROMPTS))
    return [pipeline(prompt, generator=generator, **settings).images[0] for prompt, generator in prompts]


def main(output_dir: str) -> None:
    """Writes before_after.png into the output folder and says what was made."""
    diffusers_logging.disable_progress_bar()
    args = yaml.safe_load(Path(output_dir, "train_args.yaml").read_text())
    pipeline = StableDiffusionPipeline.from_pretrained(args["pretrained_model_name_or_path"])
    pipeline.set_progress_bar_config(disable=True)
    rows = {"base": draw(pipeline, "the base", args["resolution"])}
    pipeline.load_lora_weights(output_dir, adapter_name="demo")
    for scale in (0.0, 0.5, 1.0):
        pipeline.set_adapters("demo", scale)
        rows[f"scale {scale}"] = draw(pipeline, f"the LoRA at scale {scale}", args["resolution"])
    at_zero = rows.pop("scale 0.0")
    unchanged = all(np.array_equal(a, b) for a, b in zip(rows["base"], at_zero))
    sheet = Image.new("RGB", (MARGIN + SIDE * len(PROMPTS), 44 + SIDE * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(rows.items()):
        pen.text((8, 44 + SIDE * row + SIDE // 2), name, "black", ImageFont.load_default(20), anchor="lm")
        for column, image in enumerate(images):
            place = (MARGIN + SIDE * column, 44 + SIDE * row)
            sheet.paste(image.resize((SIDE - 4, SIDE - 4), Image.Resampling.LANCZOS), place)
    for column, prompt in enumerate(PROMPTS):
        place = (MARGIN + SIDE * column + SIDE // 2, 4)
        pen.text(place, textwrap.fill(prompt, 19), "black", ImageFont.load_default(14), "ma", align="center")
    picture = Path(output_dir, "before_after.png")
    sheet.save(picture)
    metrics = map(json.loads, Path(output_dir, args["logging_dir"], "metrics.jsonl").read_text().splitlines())
    losses = [row["validation_loss"] for row in metrics if "validation_loss" in row]
    size = Path(output_dir, "pytorch_lora_weights.safetensors").stat().st_size / 2**20
    base = sum(file.stat().st_size for file in Path(args["pretrained_model_name_or_path"]).rglob("*.safetensors"))
    print(
        f"\nThe LoRA is in {output_dir}, and {picture} shows what it learned.\n"
        f"Its file has {size:.1f} MiB, and the base model has {base / 2**20:.1f} MiB.\n"
        f"Loss on a picture it never saw: {losses[0]:.4f} before, {losses[-1]:.4f} after.\n"
        f"At scale 0 the base's pictures {'come out unchanged' if unchanged else 'do NOT come out'}.\n"
        f"To load it: pipeline.load_lora_weights({output_dir!r})"
    )


if __name__ == "__main__":
    main(*sys.argv[1:] or ["outputs/demo-lora"])
