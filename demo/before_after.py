"""Draws the demo's prompts with the base and with the fine-tuned model, from the same seeds, into one picture.

python demo/before_after.py OUTPUT_DIR [--prompts PROMPT ...]
"""

import argparse
import json
import logging
import os
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


def draw(pipeline: StableDiffusionPipeline, prompts: list[str], side: int, name: str, **settings) -> list[Image.Image]:
    """Draws one picture a prompt; prompt i always starts from the noise of seed i."""
    pipeline.set_progress_bar_config(disable=True)
    settings |= {"height": side, "width": side, "num_inference_steps": 25}
    return [
        pipeline(prompt, generator=torch.Generator().manual_seed(i), **settings).images[0]
        for i, prompt in enumerate(tqdm(prompts, f"drawing {name}"))
    ]


def save_sheet(rows: dict[str, list[Image.Image]], titles: list[str], file: Path, side: int = 128) -> None:
    """Saves rows of pictures with their names on the left, and with a title over each column."""
    margin, top = 110, 60 if any(titles) else 0
    sheet = Image.new("RGB", (margin + side * len(titles), top + side * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(rows.items()):
        pen.text((8, top + side * row + side // 2), name, "black", ImageFont.load_default(20), anchor="lm")
        for column, image in enumerate(images):
            place = (margin + side * column, top + side * row)
            sheet.paste(image.resize((side - 4, side - 4), Image.Resampling.LANCZOS), place)
    for column, title in enumerate(titles):
        place = (margin + side * column + side // 2, 4)
        pen.text(place, textwrap.fill(title, 18), "black", ImageFont.load_default(14), "ma", align="center")
    sheet.save(file)


def read_args(output_dir: str) -> dict:
    """Returns a run's flags."""
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    return yaml.safe_load(Path(output_dir, "train_args.yaml").read_text())


def subject(folder: str, count: int) -> dict[str, list[Image.Image]]:
    """Returns a row of the pictures that a run learned its subject from."""
    files = sorted(Path(folder).glob("*.png"))[:count]
    return {"learned": [Image.open(file).convert("RGB") for file in files]}


def held_out_loss(output_dir: str, args: dict) -> str:
    """Says what became of the loss on pictures that the run never trained on."""
    metrics = map(json.loads, Path(output_dir, args["logging_dir"], "metrics.jsonl").read_text().splitlines())
    losses = [row["validation_loss"] for row in metrics if "validation_loss" in row]
    return f"Loss on what it never saw: {losses[0]:.4f} before, {losses[-1]:.4f} after."


def main(output_dir: str, prompts: list[str] | None) -> None:
    """Writes before_after.png into the output folder and says what was made."""
    args = read_args(output_dir)
    prompts = prompts or args["validation_prompts"]
    models = {"before": args["pretrained_model_name_or_path"], "after": output_dir}
    loaded = {name: StableDiffusionPipeline.from_pretrained(model) for name, model in models.items()}
    rows = subject(args["instance_data_dir"], len(prompts)) if args.get("instance_data_dir") else {}
    rows |= {name: draw(pipeline, prompts, args["resolution"], name) for name, pipeline in loaded.items()}
    picture = Path(output_dir, "before_after.png")
    save_sheet(rows, prompts, picture)
    print(
        f"\nThe fine-tuned model is in {output_dir}, and {picture} shows what it learned.\n"
        f"{held_out_loss(output_dir, args)}\n"
        f"To load it: DiffusionPipeline.from_pretrained({output_dir!r})"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output_dir")
    parser.add_argument("--prompts", nargs="+", help="default: the --validation_prompts of the run")
    args = parser.parse_args()
    main(args.output_dir, args.prompts)
