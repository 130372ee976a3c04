"""Puts pictures that generate.py drew onto one sheet, a row a model, and says what became of a run's held-out loss.

    python demo/show.py OUTPUT_DIR learned=demo/subject before=FOLDER,FOLDER after=FOLDER,FOLDER

Of folders with prompts, the first picture of each prompt is shown, side by side. The sheet is OUTPUT_DIR/shown.png.
"""

import json
import sys
import textwrap
from pathlib import Path

import yaml
from PIL import Image, ImageDraw, ImageFont, ImageOps


SIDE, MARGIN, TOP = 128, 110, 60  # pixels


def read_row(folder):
    """Returns the files of a folder that are shown, with their prompts."""
    metadata = Path(folder, "metadata.jsonl")
    if not metadata.exists():
        return [(file, "") for file in sorted(Path(folder).glob("*.png"))]
    rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines()]
    if rows[0].get("image"):  # as it was drawn from, which stands in a row of its own
        return [(Path(folder, row["file_name"]), row["prompt"]) for row in rows[:10]]
    firsts = {row["text"]: row for row in reversed(rows)}
    if "prompt" in rows[0] and len(firsts) > 1:
        rows = [row for row in rows if row is firsts[row["text"]]]
    rows = rows if len(firsts) > 1 else rows[:10]  # of one prompt, or none
    return [(Path(folder, row["file_name"]), row.get("prompt", "")) for row in rows]


def open_on_white(file):
    """Opens a picture in the size that it is shown in."""
    picture = Image.open(file).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return ImageOps.pad(picture, (SIDE - 4, SIDE - 4), Image.Resampling.LANCZOS)


def held_out_loss(output_dir):
    """Returns the first and the last loss on pictures that a run never trained on."""
    args = yaml.safe_load(Path(output_dir, "train_args.yaml").read_text())
    metrics = map(json.loads, Path(output_dir, args["logging_dir"], "metrics.jsonl").read_text().splitlines())
    losses = [row["validation_loss"] for row in metrics if "validation_loss" in row]
    return losses[0], losses[-1]


def main(output_dir, named):
    """Saves the sheet; prints where it is, and the loss."""
    rows = {name: [pair for folder in folders.split(",") for pair in read_row(folder)] for name, folders in named}
    titles = [prompt for _, prompt in [*rows.values()][-1]]
    sheet = Image.new("RGB", (MARGIN + SIDE * len(titles), TOP + SIDE * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (name, pictures) in enumerate(rows.items()):
        pen.text((8, TOP + SIDE * y + SIDE // 2), name, "black", ImageFont.load_default(20), anchor="lm")
        for x, (file, _) in enumerate(pictures[: len(titles)]):
            sheet.paste(open_on_white(file), (MARGIN + SIDE * x, TOP + SIDE * y))
    for x, title in enumerate(titles):
        place = (MARGIN + SIDE * x + SIDE // 2, 4)
        pen.text(place, textwrap.fill(title, 18), "black", ImageFont.load_default(14), "ma", align="center")
    sheet.save(Path(output_dir, "shown.png"))
    before, after = held_out_loss(output_dir)
    print(f"\n{output_dir}/shown.png shows what was learned.")
    print(f"Loss on pictures that it never saw: {before:.4f} before, {after:.4f} after.")


if __name__ == "__main__":
    main(sys.argv[1], [word.split("=", 1) for word in sys.argv[2:]])
