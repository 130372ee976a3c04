"""Puts pictures of the data and the first and last samples of a run of train_unconditional.py onto one sheet.

python demo/grids.py [OUTPUT_DIR]
"""

import json
import sys
from pathlib import Path

import yaml
from PIL import Image, ImageDraw, ImageFont


SIDE = 96  # pixels of a picture on the sheet
MARGIN = 90  # for the row's name


def read(file: Path, side: int) -> Image.Image:
    """Opens a picture on white, in the size that the run sees it in."""
    picture = Image.open(file).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB").resize((side, side))


def main(output_dir: str) -> None:
    """Writes before_after.png into the output folder and says what was made."""
    args = yaml.safe_load(Path(output_dir, "train_args.yaml").read_text())
    side, count = args["resolution"], args["eval_batch_size"]
    files = sorted(Path(args["train_data_dir"]).glob("*.png"))
    grids = [Image.open(grid) for grid in sorted(Path(output_dir, "samples").glob("step-*.png"))]
    rows = {"pictures": [read(file, side) for file in files[:: len(files) // count][:count]]}
    for name, grid in (("before", grids[0]), ("after", grids[-1])):
        rows[name] = [grid.crop((side * i, 0, side * i + side, side)) for i in range(count)]
    sheet = Image.new("RGB", (MARGIN + SIDE * count, SIDE * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(rows.items()):
        pen.text((6, SIDE * row + SIDE // 2), name, "black", ImageFont.load_default(16), anchor="lm")
        for column, image in enumerate(images):
            place = (MARGIN + SIDE * column, SIDE * row)
            sheet.paste(image.resize((SIDE - 4, SIDE - 4), Image.Resampling.BICUBIC), place)
    picture = Path(output_dir, "before_after.png")
    sheet.save(picture)
    metrics = map(json.loads, Path(output_dir, args["logging_dir"], "metrics.jsonl").read_text().splitlines())
    losses = [row["validation_loss"] for row in metrics if "validation_loss" in row]
    print(
        f"\nThe model is in {output_dir}, and {picture} shows what it learned.\n"
        f"Loss on pictures it never saw: {losses[0]:.4f} before, {losses[-1]:.4f} after.\n"
        f"To load it: DDPMPipeline.from_pretrained({output_dir!r})"
    )


if __name__ == "__main__":
    main(*sys.argv[1:] or ["outputs/demo-unconditional"])
