"""Draws prompts with and without a learned word, from the same seeds, before and after the word is loaded.

python demo/new_word.py OUTPUT_DIR
"""

import sys
from pathlib import Path

import numpy as np
from before_after import StableDiffusionPipeline, draw, held_out_loss, read_args, save_sheet, subject


WITH = ["a {}", "a {} on a blue background", "a {} on a green background", "a {} on a purple background"]
WITHOUT = ["a red circle on a white background", "a yellow star on a blue background"]


def main(output_dir: str) -> None:
    """Writes new_word.png into the output folder and says what was learned and what has stayed."""
    args = read_args(output_dir)
    word, side = args["placeholder_token"], args["resolution"]
    prompts = [prompt.format(word) for prompt in WITH] + WITHOUT
    pipeline = StableDiffusionPipeline.from_pretrained(args["pretrained_model_name_or_path"])
    rows = {"before": draw(pipeline, prompts, side, "before", guidance_scale=4.0)}
    pipeline.load_textual_inversion(output_dir)
    rows["after"] = draw(pipeline, prompts, side, "after", guidance_scale=4.0)
    picture = Path(output_dir, "new_word.png")
    save_sheet(subject(args["train_data_dir"], len(prompts)) | rows, prompts, picture)
    before, after = (np.stack([np.asarray(image, dtype=int) for image in images]) for images in rows.values())
    changes = abs(after - before).reshape(len(prompts), -1).max(axis=1)
    size = Path(output_dir, "learned_embeds.safetensors").stat().st_size
    print(
        f"\n{word} is in {output_dir}, {size / 1024:.1f} KiB, and {picture} shows what it learned.\n"
        f"{held_out_loss(output_dir, args)}\n"
        f"Largest change of a pixel, of 255, in prompts without {word}: {changes[len(WITH) :].max()}; "
        f"with it: {changes[: len(WITH)].max()}.\n"
        f"To load it: pipeline.load_textual_inversion({output_dir!r})"
    )


if __name__ == "__main__":
    main(sys.argv[1])
