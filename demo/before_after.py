"""Draws the demo's prompts with the base and with the fine-tuned model, from the same seeds, into one picture.

python demo/before_after.py [OUTPUT_DIR]
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

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm
from transformers.utils import logging as transformers_logging


SIDE = 128  # pixels of a picture on the sheet
MARGIN = 90  # for the row's name


def draw(model: str, args: dict) -> list[Image.Image]:
    """Draws one picture a prompt; prompt i always starts from the noise of seed i."""
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": args["resolution"], "width": args["resolution"]}
    return [
        pipeline(prompt, generator=torch.Generator().manual_seed(i), num_inference_steps=25, **size).images[0]
        for i, prompt in enumerate(tqdm(args["validation_prompts"], f"drawing with {model}"))
    ]


def main(output_dir: str) -> None:
    """Writes before_after.png into the output folder and says what was made."""
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    args = yaml.safe_load(Path(output_dir, "train_args.yaml").read_text())
    prompts = args["validation_prompts"]
    rows = {"before": draw(args["pretrained_model_name_or_path"], args), "after": draw(output_dir, args)}
    sheet = Image.new("RGB", (MARGIN + SIDE * len(prompts), 44 + SIDE * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(rows.items()):
        pen.text((8, 44 + SIDE * row + SIDE // 2), name, "black", ImageFont.load_default(20), anchor="lm")
        for column, image in enumerate(images):
            place = (MARGIN + SIDE * column, 44 + SIDE * row)
            sheet.paste(image.resize((SIDE - 4, SIDE - 4), Image.Resampling.LANCZOS), place)
    for column, prompt in enumerate(prompts):
        lines = textwrap.fill(prompt, 18)
        pen.text(
            (MARGIN + SIDE * column + SIDE // 2, 4), lines, "black", ImageFont.load_default(14), "ma", align="center"
        )
    picture = Path(output_dir, "before_after.png")
    sheet.save(picture)
    metrics = map(json.loads, Path(output_dir, args["logging_dir"], "metrics.jsonl").read_text().splitlines())
    losses = [row["validation_loss"] for row in metrics if "validation_loss" in row]
    print(
        f"\nThe fine-tuned model is in {output_dir}, and {picture} shows what it learned.\n"
        f"Loss on pictures it never saw: {losses[0]:.4f} before, {losses[-1]:.4f} after.\n"
        f"To load it: StableDiffusionPipeline.from_pretrained({output_dir!r})"
    )


if __name__ == "__main__":
    main(*sys.argv[1:] or ["outputs/demo"])
