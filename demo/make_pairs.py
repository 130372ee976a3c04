"""Draws pairs of pictures to train on: outlines and the shapes that fill them, or shapes before and after an edit.

    python demo/make_pairs.py outlines outputs/outlines --count 1000
    python demo/make_pairs.py edits outputs/edits --count 1000

An outline set has captions, such as "a red circle on a blue background", and is for train_controlnet.py. An edit set
has instructions, such as "make it green", and is for train_instruct_pix2pix.py. Beside the metadata.jsonl of the
pairs there is a prompts.jsonl, by which generate.py draws the same again from the outlines, or the shapes before,
and a prompts.txt of the prompts alone.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from make_base import COLORS, draw_shape
from PIL import Image


def ground(pixels):
    """Returns the color of the background, (3,): that of most of the edge."""
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.median(edge.astype(np.float32), axis=0)


def coverage(pixels):
    """Returns how much of each pixel a shape covers, (h, w) in 0..1: 1 where it is most unlike the background."""
    away = pixels.astype(np.float32) - ground(pixels)
    farthest = np.argsort(np.abs(away).sum(axis=2), axis=None)[-away.size // 300 :]
    front = np.median(away.reshape(-1, 3)[farthest], axis=0)
    return (away @ front / max(front @ front, 1)).clip(0, 1)


def name_of(color):
    """Returns the name of the nearest color."""
    return min(COLORS, key=lambda name: np.square(np.subtract(COLORS[name], color)).sum())


def shape_color(pixels):
    """Returns the name of a shape's color."""
    return name_of(np.median(pixels[coverage(pixels) > 0.5], axis=0))


def outline(pixels):
    """Returns white lines on black where a shape ends."""
    inside = np.pad(coverage(pixels) > 0.5, 1, mode="edge")
    within = inside[1:-1, 2:] & inside[1:-1, :-2] & inside[2:, 1:-1] & inside[:-2, 1:-1]
    edge = inside[1:-1, 1:-1] & ~within
    return np.repeat(255 * edge[..., None].astype(np.uint8), 3, axis=2)


def recolored(pixels, color):
    """Returns a shape in another color."""
    alpha = coverage(pixels)[..., None]
    return (alpha * np.array(COLORS[color]) + (1 - alpha) * ground(pixels)).round().astype(np.uint8)


def main():
    """Draws the set."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=["outlines", "edits"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=500, help="pairs")
    parser.add_argument("--resolution", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--seed", type=int, default=0, help="names the set: two seeds have no pair in common")
    args = parser.parse_args()
    rng, rows, prompts = np.random.default_rng(args.seed), [], []
    for i in range(args.count):
        pixels, words = draw_shape(rng, args.resolution)
        if args.kind == "outlines":
            pair = {"pictures": pixels, "outlines": outline(pixels)}
            row = {"file_name": f"pictures/{i:04d}.png", "conditioning_image_file_name": f"outlines/{i:04d}.png"}
            row["text"] = words
        else:
            used = (shape_color(pixels), name_of(ground(pixels)))
            color = str(rng.choice([name for name in COLORS if name not in used]))
            pair = {"before": pixels, "after": recolored(pixels, color)}
            row = {"input_image_file_name": f"before/{i:04d}.png", "edited_image_file_name": f"after/{i:04d}.png"}
            words = row["edit_prompt"] = f"make it {color}"
        for name, picture in pair.items():
            (args.folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(args.folder / name / f"{i:04d}.png")
        seen = "outlines" if args.kind == "outlines" else "before"
        prompts.append({"prompt": words, "image": str(args.folder / seen / f"{i:04d}.png")})
        rows.append(row)
    (args.folder / "prompts.txt").write_text("".join(f"{prompt['prompt']}\n" for prompt in prompts))
    for name, lines in (("metadata", rows), ("prompts", prompts)):
        (args.folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
