"""
Makes demo/clip: a tiny CLIP that was really trained, on the shapes, colors and emoji that the demos draw.

    python demo/make_clip.py

It learns from nothing on a CPU, in about ten minutes on two cores: shapes as demo/base learned them, and the emoji of
demo/pictures on backgrounds of every color. Its vision tower first learns to name what is there, and then both towers
which caption belongs to which picture. The pictures are bent, blurred and mottled, and some go through demo/base's
VAE, because what it will judge was drawn by a small diffusion model. The pictures of demo/subject are kept for the
test at the end; their pig is one of the emoji.
"""

import argparse
import json
import math
import random
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from make_base import COLORS, SHAPES, SIZE, article, draw_shape, learning_rate, to_tensor
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTokenizer


HERE = Path(__file__).resolve().parent
EMOJI = {"animals": {}, "faces": {}}
for line in (HERE / "pictures" / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
    row = json.loads(line)
    picture = Image.open(HERE / "pictures" / row["file_name"]).convert("RGBA")
    EMOJI[row["file_name"].split("-")[0]][row["text"]] = picture
ANIMALS, FACES = EMOJI.values()
PIG = "pig face"
# The facts of a picture are its size, its color, its subject and its background; "" for what is not known.
NUMBERS = {"": -1} | {word: i for i, word in enumerate(["small", "big", *COLORS, *SHAPES, *ANIMALS, *FACES])}


def draw_known_shape(rng):
    """Draws a shape whose caption names both colors, and returns it with its facts."""
    while True:
        pixels, caption = draw_shape(rng)
        words = caption.replace(",", "").split()
        colors = [word for word in words if word in COLORS]
        if len(colors) == 2:
            size, shape = [next((word for word in words if word in some), "") for some in (("small", "big"), SHAPES)]
            return pixels, (size, colors[0], shape, colors[1])


def draw_emoji(rng, name):
    """Puts an emoji on white, as training on them does, or on another background, and returns it with its facts."""
    background = "white" if rng.random() < 0.4 else str(rng.choice(list(COLORS)))
    side = SIZE if rng.random() < 0.4 else int(SIZE * rng.uniform(0.45, 1))
    color = np.clip(np.array(COLORS[background]) + rng.uniform(-10, 10, 3), 0, 255).astype(int)
    canvas = Image.new("RGBA", (SIZE, SIZE), (*color.tolist(), 255))
    canvas.alpha_composite((ANIMALS | FACES)[name].resize((side, side)), tuple(rng.integers(SIZE - side + 1, size=2)))
    return np.asarray(canvas.convert("RGB")), ("", "", name, background)


def draw_pictures(rng, count):
    """Draws six shapes, a pig, another animal and two faces for every ten pictures, and says what they are."""
    kinds = [[]] * 6 + [[PIG], list(ANIMALS), list(FACES), list(FACES)]
    names = [rng.choice(kinds[i % 10]) if kinds[i % 10] else None for i in range(count)]
    drawn = [draw_emoji(rng, str(name)) if name else draw_known_shape(rng) for name in names]
    return np.stack([pixels for pixels, _ in drawn]), [facts for _, facts in drawn]


@torch.no_grad()
def redraw(vae, pictures):
    """Sends pictures through the VAE, with some noise on the latents."""
    for i in range(0, len(pictures), 50):
        latents = vae.encode(to_tensor(pictures[i : i + 50])).latent_dist.mean
        noise = 0.3 * torch.rand(len(latents), 1, 1, 1) * torch.randn(latents.shape)
        pixels = vae.decode(latents + noise).sample.clamp(-1, 1)
        pictures[i : i + 50] = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def disturb(pixels):
    """Mirrors, moves, turns, scales and bends pictures, then blurs, tints and mottles them."""
    n = len(pixels)
    turn, zoom, x, y, contrast = torch.tensor([[0.2], [0.15], [0.1], [0.1], [0.2]]) * (2 * torch.rand(5, n) - 1)
    mirror = torch.randint(2, (n,)) * 2 - 1
    cos, sin = (1 + zoom) * turn.cos(), (1 + zoom) * turn.sin()
    matrix = torch.stack([cos * mirror, -sin, x, sin * mirror, cos, y], dim=1).view(n, 2, 3)
    bend = F.interpolate(torch.randn(n, 2, 7, 7), SIZE, mode="bicubic") * 0.05 * torch.rand(n, 1, 1, 1)
    grid = F.affine_grid(matrix, pixels.shape, align_corners=False) + bend.permute(0, 2, 3, 1)
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
    pixels = torch.where(torch.rand(n, 1, 1, 1) < 0.3, blurred, pixels)
    pixels = pixels * (1 + contrast[:, None, None, None]) + 0.06 * torch.randn(n, 3, 1, 1)
    mottle = F.interpolate(torch.randn(n, 3, 16, 16), SIZE, mode="bilinear") * 0.1 * torch.rand(n, 1, 1, 1)
    return (pixels + mottle + 0.04 * torch.randn(pixels.shape)).clamp(-1, 1)


def phrase(facts, short=True):
    """Words facts plainly; an animal's face is the animal."""
    size, color, name, background = facts
    name = name.removesuffix(" face") if short and name in ANIMALS else name
    thing = article(" ".join(word for word in (size, color, name) if word))
    return thing + (f" on {article(background)} background" if background else "")


def say(rng, facts):
    """Words facts in one of several ways, and returns the caption with the facts that it names."""
    if rng.random() < 0.4:
        facts = tuple(word if i == 2 or rng.random() < 0.5 else "" for i, word in enumerate(facts))
    caption = phrase(facts, short=rng.random() < 0.6)
    if facts[2] not in SHAPES and rng.random() < 0.4:
        caption = caption.split(" ", 1)[1]  # the emoji's own captions have no article
    return rng.choice([""] * 8 + ["a picture of ", "a drawing of "]) + caption, facts


def falsify(rng, facts):
    """Exchanges one fact for another of its kind, or color and background for each other."""
    size, color, name, background = facts
    kind = rng.choice(["name", "background", "color", "swap"] if color else ["name", "background"])
    if kind == "swap":
        return size, background, name, color
    if kind == "name":
        group = next(group for group in (SHAPES, ANIMALS, FACES) if name in group)
        return size, color, rng.choice([word for word in group if word != name]), background
    other = rng.choice([word for word in COLORS if word not in (color, background)])
    return (size, other, name, background) if kind == "color" else (size, color, name, other)


def compare(model, tokenizer, pixels, captions):
    """Returns how well every caption fits every picture, (pictures, captions): the cosine times the learned scale."""
    inputs = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    return model(**inputs, pixel_values=pixels).logits_per_image


def learn_facts(vision, pictures, facts, args):
    """Trains a vision tower to name the color, the subject and the background of pictures."""
    rng = np.random.default_rng(args.seed)
    known = torch.tensor([[NUMBERS[word] for word in row[1:]] for row in facts])
    heads = torch.nn.Linear(vision.config.hidden_size, 3 * len(NUMBERS))
    parameters = [*vision.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    started = time.time()
    for step in range(args.naming_steps):
        index = rng.integers(len(pictures), size=args.batch_size)
        features = vision(pixel_values=disturb(to_tensor(pictures[index])).contiguous()).pooler_output
        guesses = heads(features).view(-1, 3, len(NUMBERS)).transpose(1, 2)
        loss = F.cross_entropy(guesses, known[index], ignore_index=-1)
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.naming_steps, args.learning_rate)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"names {step + 1:5d}  loss {loss:.4f}  {time.time() - started:.0f} s", flush=True)


def train(model, tokenizer, pictures, facts, args):
    """Trains with CLIP's loss, and with two captions for each picture that are wrong in one point."""
    rng = random.Random(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    own = torch.arange(args.batch_size)
    started = time.time()
    losses = []
    for step in range(args.steps):
        index = rng.sample(range(len(pictures)), args.batch_size)
        batch = [facts[i] for i in index]
        captions, named = zip(*[say(rng, row) for row in batch + [falsify(rng, row) for row in batch * 2]])
        logits = compare(model, tokenizer, disturb(to_tensor(pictures[index])), list(captions))
        # Another picture's caption that is true of this one as well counts neither for nor against it.
        there, said = (torch.tensor([[NUMBERS[word] for word in row] for row in rows]) for rows in (batch, named))
        also_true = ((said == -1) | (said == there[:, None])).all(dim=2)
        also_true[own, own] = False
        logits = logits.masked_fill(also_true, -torch.inf)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits[:, : len(own)].T, own)) / 2
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps, args.learning_rate)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad()
        model.logit_scale.data.clamp_(max=math.log(100))
        losses.append(loss.detach())
        if (step + 1) % 50 == 0:
            mean = torch.stack(losses[-50:]).mean()
            print(f"clip {step + 1:5d}  loss {mean:.4f}  {time.time() - started:.0f} s", flush=True)


@torch.no_grad()
def measure(title, model, tokenizer, pictures, facts):
    """Says how often, and by what cosine, pictures prefer their caption to those with one word exchanged."""
    kinds = [("color", 1, COLORS), ("shape", 2, SHAPES), ("emoji", 2, ANIMALS | FACES), ("background", 3, COLORS)]
    for kind, place, words in kinds:
        known = [i for i, row in enumerate(facts) if row[place] in words]
        if not known:
            continue
        asked = [[phrase((*facts[i][:place], word, *facts[i][place + 1 :])) for word in words] for i in known]
        captions = list(dict.fromkeys(sum(asked, [])))
        column = {caption: i for i, caption in enumerate(captions)}
        cosines = compare(model, tokenizer, to_tensor(pictures[known]), captions) / model.logit_scale.exp()
        cosines = cosines.gather(1, torch.tensor([[column[caption] for caption in row] for row in asked]))
        right = torch.tensor([[list(words).index(facts[i][place])] for i in known])
        others = cosines.scatter(1, right, -1).max(dim=1).values
        lead = cosines.gather(1, right)[:, 0] - others
        print(
            f"{title}: {kind} right in {(lead > 0).sum()} of {len(known)} pictures; cosine of the right caption "
            f"{cosines.gather(1, right).mean():.3f}, of the best wrong one {others.mean():.3f}"
        )


def main():
    parser = argparse.ArgumentParser(description="Trains the tiny CLIP in demo/clip.")
    parser.add_argument("--output_dir", default=HERE / "clip", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=24000)
    parser.add_argument("--redrawn", type=int, default=8000, help="how many of them go through the VAE")
    parser.add_argument("--naming_steps", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    base = StableDiffusionPipeline.from_pretrained(HERE / "base")
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "base" / "tokenizer")
    started = time.time()
    pictures, facts = draw_pictures(np.random.default_rng(args.seed), args.pictures)
    print(f"{time.time() - started:.0f} s")
    redraw(base.vae, pictures[: args.redrawn])
    print(f"{time.time() - started:.0f} s")
    text = CLIPTextConfig.from_pretrained(HERE / "base" / "text_encoder", hidden_size=64, intermediate_size=256)
    vision = dict(image_size=SIZE, patch_size=16, hidden_size=96, intermediate_size=288)
    vision |= dict(num_hidden_layers=4, num_attention_heads=4)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=32))
    model.vision_model.embeddings.position_embedding.weight.data.normal_()  # shapes are places
    learn_facts(model.vision_model, pictures, facts, args)
    train(model, tokenizer, pictures, facts, args)

    model.eval().half().save_pretrained(args.output_dir)  # so that it is small
    model.float()
    for file in (HERE / "base" / "tokenizer").iterdir():
        shutil.copy(file, args.output_dir)
    side = dict(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    CLIPImageProcessorPil(**side, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(args.output_dir)

    new = np.random.default_rng(args.seed + 1)
    pictures, facts = draw_pictures(new, 1000)
    measure("drawn anew", model, tokenizer, pictures, facts)
    redraw(base.vae, pictures)
    measure("through the VAE", model, tokenizer, pictures, facts)
    files = sorted((HERE / "subject").glob("*.png"))
    pigs = np.stack([np.asarray(Image.open(file).convert("RGB").resize((SIZE, SIZE))) for file in files])
    measure("demo/subject", model, tokenizer, pigs, [("", "", PIG, file.stem.split("-")[1]) for file in files])
    facts = [("", *draw_known_shape(new)[1][1:]) for _ in range(48)]
    base.set_progress_bar_config(disable=True)
    settings = {"height": SIZE, "width": SIZE, "num_inference_steps": 25, "output_type": "np"}
    drawn = [base(phrase(row), generator=torch.Generator().manual_seed(i), **settings) for i, row in enumerate(facts)]
    drawn = np.stack([(255 * out.images[0]).round().astype(np.uint8) for out in drawn])
    measure("by demo/base", model, tokenizer, drawn, facts)


if __name__ == "__main__":
    main()
