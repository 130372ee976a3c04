"""Draws prompts with the base model and with a LoRA at rising scales, from the same seeds, into one picture.

python demo/lora_scales.py OUTPUT_DIR
"""

import sys
from pathlib import Path

import numpy as np
from before_after import StableDiffusionPipeline, draw, held_out_loss, read_args, save_sheet, subject


# The subject on what it was trained on and on what it never was, and two of the base's own.
PROMPTS = ["a sks on a blue background", "a sks on a yellow background", "a sks on a red background"]
PROMPTS += ["a red circle on a blue background", "a green square on a yellow background"]


def main(output_dir: str) -> None:
    """Writes scales.png into the output folder and says what was made."""
    args = read_args(output_dir)
    side, base = args["resolution"], Path(args["pretrained_model_name_or_path"])
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    rows = subject(args["instance_data_dir"], len(PROMPTS)) | {"base": draw(pipeline, PROMPTS, side, "the base")}
    pipeline.load_lora_weights(output_dir, adapter_name="demo")
    for scale in (0.0, 0.5, 1.0):
        pipeline.set_adapters("demo", scale)
        rows[f"scale {scale}"] = draw(pipeline, PROMPTS, side, f"the LoRA at scale {scale}")
    at_zero = rows.pop("scale 0.0")
    change = max(
        abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(rows["base"], at_zero, strict=True)
    )
    picture = Path(output_dir, "scales.png")
    save_sheet(rows, PROMPTS, picture)
    sizes = [Path(output_dir, "pytorch_lora_weights.safetensors").stat().st_size / 2**20]
    sizes += [sum(file.stat().st_size for file in base.rglob("*.safetensors")) / 2**20]
    print(
        f"\nThe LoRA is in {output_dir}, and {picture} shows what it learned.\n"
        f"Its file has {sizes[0]:.1f} MiB, and the base model has {sizes[1]:.1f} MiB.\n"
        f"{held_out_loss(output_dir, args)}\n"
        f"Largest change of a pixel, of 255, at scale 0: {change}.\n"
        f"To load it: pipeline.load_lora_weights({output_dir!r})"
    )


if __name__ == "__main__":
    main(sys.argv[1])
