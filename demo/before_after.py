"""Draws the demo's prompts with the base and with the fine-tuned model, from the same seeds, into one picture.

python demo/before_after.py OUTPUT_DIR [--prompts PROMPT ...]

A demo whose result is no pipeline calls main with a function of its own that loads it.
"""

import argparse
import json
import logging
import os
import textwrap
from collections.abc import Callable
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


def draw(pipeline: StableDiffusionPipeline, prompts: list[str], side: int, name: str) -> list[Image.Image]:
    """Draws one picture a prompt; prompt i always starts from the noise of seed i."""
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": side, "width": side, "num_inference_steps": 25}
    return [
        pipeline(prompt, generator=torch.Generator().manual_seed(i), **settings).images[0]
        for i, prompt in enumerate(tqdm(prompts, f"drawing {name}"))
    ]


def main(output_dir: str, prompts: list[str] | None, load: Callable = StableDiffusionPipeline.from_pretrained) -> None:
    """Writes before_after.png into the output folder and says what was made.

    prompts: what to draw, or None for the --validation_prompts of the run; load: makes a pipeline of output_dir.
    """
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    args = yaml.safe_load(Path(output_dir, "train_args.yaml").read_text())
    prompts = prompts or args["validation_prompts"]
    base = StableDiffusionPipeline.from_pretrained(args["pretrained_model_name_or_path"])
    rows = {"before": draw(base, prompts, args["resolution"], "before")}
    rows["after"] = draw(load(output_dir), prompts, args["resolution"], "after")
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
        f"\nThe result is in {output_dir}, its README.md says how to load it, and {picture} shows what it learned.\n"
        f"Loss on pictures it never saw: {losses[0]:.4f} before, {losses[-1]:.4f} after."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output_dir")
    parser.add_argument("--prompts", nargs="+", help="default: the --validation_prompts of the run")
    args = parser.parse_args()
    main(args.output_dir, args.prompts)
