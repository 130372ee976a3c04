"""Puts pictures of the data and the first and last samples of a run of train_unconditional.py onto one sheet.

python demo/grids.py OUTPUT_DIR
"""

import sys
from pathlib import Path

from before_after import Image, held_out_loss, read_args, save_sheet


def read(file: Path, side: int) -> Image.Image:
    """Opens a picture on white, in the size that the run sees it in."""
    picture = Image.open(file).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB").resize((side, side))


def main(output_dir: str) -> None:
    """Writes before_after.png into the output folder and says what was made."""
    args = read_args(output_dir)
    side, count = args["resolution"], args["eval_batch_size"]
    files = sorted(Path(args["train_data_dir"]).glob("*.png"))
    grids = [Image.open(grid) for grid in sorted(Path(output_dir, "samples").glob("step-*.png"))]
    rows = {"pictures": [read(file, side) for file in files[:: len(files) // count][:count]]}
    for name, grid in (("before", grids[0]), ("after", grids[-1])):
        rows[name] = [grid.crop((side * i, 0, side * i + side, side)) for i in range(count)]
    picture = Path(output_dir, "before_after.png")
    save_sheet(rows, [""] * count, picture, side=96)
    print(
        f"\nThe model is in {output_dir}, and {picture} shows what it learned.\n"
        f"{held_out_loss(output_dir, args)}\n"
        f"To load it: DDPMPipeline.from_pretrained({output_dir!r})"
    )


if __name__ == "__main__":
    main(sys.argv[1])
