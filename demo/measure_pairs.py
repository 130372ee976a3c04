"""Says how well pictures that generate.py drew by a set's prompts.jsonl follow their outlines, or their edits.

    python demo/measure_pairs.py outputs/outlines DRAWN_FOLDER [...]

Each picture is compared with the set's own: how much of the two shapes overlaps (the intersection by the union), and
whether the shape has the same color.
"""

import json
import sys
from pathlib import Path

import numpy as np
from make_pairs import coverage, shape_color
from PIL import Image


def read(file):
    """Returns a picture as numbers, uint8 (64, 64, 3)."""
    return np.asarray(Image.open(file).convert("RGB"))


def main(pairs, *folders):
    """Prints a line for each folder of drawn pictures."""
    rows = [json.loads(line) for line in Path(pairs, "metadata.jsonl").read_text().splitlines()]
    names = [row.get("file_name") or row["edited_image_file_name"] for row in rows]
    for folder in folders:
        overlaps, same_color = [], 0
        for i, name in enumerate(names):
            drawn, wanted = read(Path(folder, f"{i:05d}-0.png")), read(Path(pairs, name))
            first, second = coverage(drawn) > 0.5, coverage(wanted) > 0.5
            overlaps.append((first & second).sum() / (first | second).sum())
            same_color += shape_color(drawn) == shape_color(wanted)
        overlap = f"the shapes overlap by {np.mean(overlaps):.2f} on average, {min(overlaps):.2f} at least"
        print(f"{folder}: {overlap}; {same_color} of {len(names)} have the color that was asked for")


if __name__ == "__main__":
    main(*sys.argv[1:])
