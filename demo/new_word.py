"""Draws prompts with and without a learned word, from the same seeds, before and after the word is loaded.

python demo/new_word.py [OUTPUT_DIR]
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
from transformers.utils import logging as transformers_logging


SIDE = 128  # pixels of a picture on the sheet
MARGIN = 90  # for the row's name
WITH = ["a {}", "a {} on a blue background", "a {} on a green background", "a {} on a purple background"]
WITHOUT = ["a red circle on a white background", "a yellow star on a blue background"]


def draw(pipeline: StableDiffusionPipeline, prompts: list[str], side: int) -> list[Image.Image]:
    """Draws one picture a prompt; prompt i always starts from the noise of seed i."""
    settings = {"height": side, "width": side, "num_inference_steps": 25, "guidance_scale": 4.0}
    return [
        pipeline(prompt, generator=torch.Generator().manual_seed(i), **settings).images[0]
        for i, prompt in enumerate(tqdm(prompts, "drawing"))
    ]


def main(output_dir: str) -> None:
    """Writes new_word.png into the output folder and says what was learned and what has stayed."""
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    args = yaml.safe_load(Path(output_dir, "train_args.yaml").read_text())
    word, side = args["placeholder_token"], args["resolution"]
    prompts = [prompt.format(word) for prompt in WITH] + WITHOUT
    pipeline = StableDiffusionPipeline.from_pretrained(args["pretrained_model_name_or_path"])
    pipeline.set_progress_bar_config(disable=True)
    rows = {"before": draw(pipeline, prompts, side)}
    pipeline.load_textual_inversion(output_dir)
    rows["after"] = draw(pipeline, prompts, side)
    sheet = Image.new("RGB", (MARGIN + SIDE * len(prompts), 44 + SIDE * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(rows.items()):
        pen.text((8, 44 + SIDE * row + SIDE // 2), name, "black", ImageFont.load_default(20), anchor="lm")
        for column, image in enumerate(images):
            place = (MARGIN + SIDE * column, 44 + SIDE * row)
            sheet.paste(image.resize((SIDE - 4, SIDE - 4), Image.Resampling.LANCZOS), place)
    for column, prompt in enumerate(prompts):
        place = (MARGIN + SIDE * column + SIDE // 2, 4)
        pen.text(place, textwrap.fill(prompt, 18), "black", ImageFont.load_default(14), "ma", align="center")
    picture = Path(output_dir, "new_word.png")
    sheet.save(picture)
    before, after = (np.stack([np.asarray(image, dtype=int) for image in images]) for images in rows.values())
    changes = abs(after - before).reshape(len(prompts), -1).max(axis=1)
    metrics = map(json.loads, Path(output_dir, args["logging_dir"], "metrics.jsonl").read_text().splitlines())
    losses = [row["validation_loss"] for row in metrics if "validation_loss" in row]
    size = Path(output_dir, "learned_embeds.safetensors").stat().st_size
    print(
        f"\n{word} is in {output_dir}, {size / 1024:.1f} KiB, and {picture} shows what it learned.\n"
        f"Loss on a picture it never saw: {losses[0]:.4f} before, {losses[-1]:.4f} after.\n"
        f"Largest change of a pixel, of 255, in prompts without {word}: {changes[len(WITH) :].max()}; "
        f"with it: {changes[: len(WITH)].max()}.\n"
        f"To load it: pipeline.load_textual_inversion({output_dir!r})"
    )


if __name__ == "__main__":
    main(*sys.argv[1:] or ["outputs/demo-textual-inversion"])
