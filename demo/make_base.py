"""
Makes demo/base: a tiny Stable Diffusion that was really trained, on shapes drawn on the fly.

    python demo/make_base.py

Everything is learned from nothing on a CPU, in about half an hour on two cores: a VAE on abstract drawings, then the
UNet and the text encoder together on captioned shapes ("a red circle on a blue background"), then the VAE's decoder
once more. The result has the same parts, file names and settings as Stable Diffusion 1.x, so every script and every
pipeline takes it for one; it is only some 300 times smaller. Pictures are 64 x 64 pixels, latents 16 x 16 x 4. Run
again after an interruption, it goes on from its last snapshot.
"""

import argparse
import copy
import json
import logging
import math
import os
import shutil
import tempfile
import time
from pathlib import Path


# transformers warns that torchvision is absent, which is not used here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


SIZE = 64  # pixels
CANVAS = 256  # pixels; drawn large and shrunk, which gives smooth edges
MAX_TOKENS = 32
SHAPES = "circle square triangle star heart ring cross crescent".split()
COLORS = {
    "red": (220, 30, 35),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 40),
    "green": (40, 160, 65),
    "blue": (40, 80, 220),
    "purple": (135, 45, 170),
    "black": (20, 20, 22),
    "white": (248, 248, 248),
}
# Words the base has never seen drawn. They get tokens of their own, so that a fine-tune has something to hold on to.
WORDS = """a an the of on in with and one two three my your this that is no not very small big little large old new
picture photo drawing painting icon emoji sticker cartoon style face head eye eyes ear mouth nose tongue hand hair
body happy sad angry smiling grinning laughing crying winking kissing sleeping tired fearful surprised closed open
front side cat dog mouse rabbit fox bear panda koala tiger lion cow pig frog monkey chicken bird penguin duck owl
horse wolf fish whale dolphin octopus crab snake turtle snail bee butterfly elephant giraffe zebra sheep goat deer
dragon unicorn hen man woman boy girl child person house home car train ship boat plane tree flower leaf grass sun
moon sky cloud rain snow sea river mountain road city fire water light dark day night bread cake apple fruit ball
box book chair table door window toy backpack hat shoe glasses pink brown gray cyan gold silver bright soft round
long tall wide left right top bottom"""


def polygon(shape):
    """Returns the corners of a shape, (n, 2), within the unit circle."""
    if shape == "heart":
        t = np.linspace(0, 2 * math.pi, 60)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([16 * np.sin(t) ** 3, -y - 2], axis=1) / 16
    if shape == "cross":
        quarter = np.array([(0.3, 0.3), (0.95, 0.3), (0.95, -0.3)])
        return np.concatenate([quarter @ np.array([(c, -s), (s, c)]) for c, s in [(1, 0), (0, 1), (-1, 0), (0, -1)]])
    n = {"triangle": 3, "square": 4, "star": 10}[shape]
    angle = 2 * math.pi * np.arange(n) / n + (math.pi / 4 if shape == "square" else -math.pi / 2)
    radius = np.where(np.arange(n) % 2, 0.42, 1) if shape == "star" else np.ones(n)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]


def article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def draw_shape(rng, side=SIZE):
    """Draws a shape, uint8 (side, side, 3), and says what it is in one of several ways."""
    canvas = CANVAS * side // SIZE
    shape = rng.choice(SHAPES)
    color, background = rng.choice(list(COLORS), 2, replace=False)
    size = rng.choice(["small", "", "", "big"])
    low, high = {"small": (0.34, 0.44), "": (0.5, 0.68), "big": (0.74, 0.9)}[size]
    radius = rng.uniform(low, high) * canvas / 2
    center = canvas / 2 + rng.uniform(-1, 1, 2) * (canvas / 2 - radius) * 0.6
    tilt = rng.uniform(-0.35, 0.35)

    mask = Image.new("L", (canvas, canvas))
    draw = ImageDraw.Draw(mask)

    def disk(offset, r, value):
        x, y = center + radius * np.array(offset)
        draw.ellipse([x - r * radius, y - r * radius, x + r * radius, y + r * radius], fill=value)

    if shape in ("circle", "ring", "crescent"):
        disk((0, 0), 1, 255)
        if shape == "ring":
            disk((0, 0), 0.58, 0)
        if shape == "crescent":
            disk((0.45 * math.cos(tilt), 0.45 * math.sin(tilt)), 0.85, 0)
    else:
        turn = np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])
        draw.polygon([tuple(point) for point in center + radius * polygon(shape) @ turn], fill=255)

    alpha = np.asarray(mask.resize((side, side), Image.Resampling.BOX), dtype=np.float32)[..., None] / 255
    front, back = [np.clip(np.array(COLORS[c]) + rng.uniform(-10, 10, 3), 0, 255) for c in (color, background)]
    pixels = (alpha * front + (1 - alpha) * back).round().astype(np.uint8)

    thing = article(" ".join(word for word in [size if rng.random() < 0.8 else "", color, shape] if word))
    place = article(f"{background} background")
    ways = [f"{thing} on {place}"] * 6
    ways += [f"a picture of {thing} on {place}", f"a drawing of {thing}, {background} background"]
    ways += [thing, f"a {shape}", f"a {shape} on {place}"]
    return pixels, str(rng.choice(ways))


def draw_abstract(rng):
    """Draws a heap of random strokes and patches, uint8 (64, 64, 3): the VAE has to cope with any picture."""
    size = CANVAS // 2

    def paint():
        """A plain color, or a gradient from one color to another."""
        first, last = rng.integers(0, 256, (2, 3))
        if rng.random() < 0.5:
            return Image.new("RGB", (size, size), tuple(int(c) for c in first))
        ramp = np.linspace(0, 1, size)[:, None, None] * np.ones((1, size, 1))
        ramp = np.rot90(first + (last - first) * ramp, rng.integers(4))
        return Image.fromarray(ramp.astype(np.uint8))

    canvas = paint() if rng.random() < 0.5 else Image.new("RGB", (size, size), "white")
    count = rng.integers(3, 25)
    for i in range(count):
        mask = Image.new("L", (size, size))
        draw = ImageDraw.Draw(mask)
        reach = size * rng.uniform(0.4, 1.2) / (1 + 5 * i / count)  # large patches first, small details on top
        x, y = (0.5 + 0.22 * rng.normal(size=2)) * size
        w, h = rng.uniform(0.1, 0.5, 2) * reach
        box = [x - w, y - h, x + w, y + h]
        start, sweep = rng.uniform(0, 360), rng.uniform(40, 320)
        width = int(rng.uniform(2, 9))
        points = [(x + rng.normal() * w, y + rng.normal() * h) for _ in range(rng.integers(3, 7))]
        kind = rng.choice(["ellipse", "ellipse", "polygon", "rectangle", "line", "arc", "chord", "outline"])
        if kind == "ellipse":
            draw.ellipse(box, fill=255)
        elif kind == "polygon":
            draw.polygon(points, fill=255)
        elif kind == "rectangle":
            draw.rounded_rectangle(box, radius=min(w, h) * rng.uniform(0, 1), fill=255)
        elif kind == "line":
            draw.line(points, fill=255, width=width, joint="curve")
        elif kind == "arc":
            draw.arc(box, start, start + sweep, fill=255, width=width)
        elif kind == "chord":
            draw.chord(box, start, start + sweep, fill=255)
        else:
            draw.ellipse(box, outline=255, width=width)
        canvas.paste(paint(), mask=mask)
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX))


def to_tensor(pictures):
    """Turns uint8 (n, 64, 64, 3) into float32 (n, 3, 64, 64) within -1..1."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


def learning_rate(step, steps, peak):
    """Warms up over 100 steps, then falls along a cosine to a fiftieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))
    return peak * min(1, (step + 1) / 100) * (0.02 + 0.98 * cosine)


def make_tokenizer(captions, path):
    """Learns a byte-level BPE vocabulary, in the two files that every version of CLIPTokenizer reads."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), byte_level])
    trainer = trainers.BpeTrainer(vocab_size=1400, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator([*captions, *[WORDS] * 20], trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    # Every byte, alone and at the end of a word, so that no text is unknown.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    os.makedirs(path, exist_ok=True)
    Path(path, "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *[f"{a} {b}" for a, b in merges]]
    Path(path, "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(path)
    return tokenizer


@torch.no_grad()
def start_as_identity(model):
    """Lets every block pass its input on at first: colors get through the group norms, and learning is much faster."""
    for name, weight in model.named_parameters():
        if name.endswith(("conv2.weight", "proj_out.weight", "attentions.0.to_out.0.weight")):
            weight.zero_()
        elif weight.dim() == 4 and ("resnets" not in name or "shortcut" in name):
            noise = 0.3 * torch.randn(weight.shape) / weight[0].numel() ** 0.5
            weight.copy_(torch.nn.init.dirac_(torch.empty(weight.shape)) + noise)


def make_vae():
    """Builds the VAE (0.5 M parameters): 64 x 64 x 3 pixels to 16 x 16 x 4 latents and back."""
    return AutoencoderKL(
        block_out_channels=(32, 32, 48),
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    ).to(memory_format=torch.channels_last)


def train_vae(vae, args, seed):
    """Trains what is not frozen of the VAE to redraw pictures: L1 on pixels and on their differences, a little KL."""
    rng = np.random.default_rng(seed)
    pictures = np.stack([draw_abstract(rng) if i % 4 else draw_shape(rng)[0] for i in range(args.vae_pictures)])
    trainable = [weight for weight in vae.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trainable, weight_decay=1e-2, betas=(0.9, 0.99), fused=True)
    started = time.time()
    for step in range(args.vae_steps):
        batch = pictures[rng.integers(len(pictures), size=8)]
        # Mirrored and with exchanged color channels, each drawing stands for many.
        batch = batch[:, :: rng.choice([-1, 1]), :: rng.choice([-1, 1]), rng.permutation(3)]
        pixels = to_tensor(np.ascontiguousarray(batch))
        posterior = vae.encode(pixels).latent_dist
        error = vae.decode(posterior.sample()).sample - pixels
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss = error.abs().mean() + 0.3 * edges + 1e-6 * posterior.kl().mean()
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.vae_steps, 1e-3)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            l1 = error.detach().abs().mean()
            seconds = time.time() - started
            print(f"vae {step:5d}  l1 {l1:.4f}  kl {posterior.kl().mean():.0f}  {seconds:.0f} s", flush=True)


@torch.no_grad()
def encode_shapes(vae, args):
    """Draws the captioned shapes and keeps only what the UNet needs: latents (n, 4, 16, 16), scaled, and captions."""
    rng = np.random.default_rng(args.seed + 1)
    means, captions = [], []
    for _ in range(0, args.shapes, 100):
        drawn = [draw_shape(rng) for _ in range(100)]
        means.append(vae.encode(to_tensor(np.stack([pixels for pixels, _ in drawn]))).latent_dist.mean)
        captions += [caption for _, caption in drawn]
    latents = torch.cat(means)
    # Diffusion starts from noise of mean zero. Move the latents there; the decoder's first layer moves them back.
    center = latents.mean(dim=(0, 2, 3))
    vae.quant_conv.bias[:4] -= center
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ center
    latents = latents - center[:, None, None]
    scaling_factor = round(1 / latents.std().item(), 5)
    vae.register_to_config(scaling_factor=scaling_factor)
    return latents * scaling_factor, captions


def make_denoiser(tokenizer):
    """Builds the UNet (2.7 M parameters) and the text encoder (0.5 M) that learn together."""
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(64, 64, 80),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    ).to(memory_format=torch.channels_last)
    start_as_identity(unet)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_TOKENS,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_encoder = CLIPTextModel(config)
    # Words that no caption teaches stay as they are drawn here; as small as usual, they would all look the same beside
    # the learned ones.
    torch.nn.init.normal_(text_encoder.get_input_embeddings().weight, std=0.15)
    return torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})


def train_denoiser(args, tokenizer, vae, latents, captions):
    """Trains UNet and text encoder to predict the noise (DDPM, eq. 14), and writes the pipeline now and then."""
    noise_scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    torch.manual_seed(args.seed)
    model = make_denoiser(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2, betas=(0.9, 0.99), fused=True)
    ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=False, foreach=True)
    snapshot = os.path.join(args.work_dir, "denoiser.pt")
    first = 0
    if os.path.exists(snapshot):
        state = torch.load(snapshot, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        first = state["step"]

    # A caption is left out of one sample in ten, for classifier-free guidance.
    options = dict(padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    token_ids = tokenizer(captions, **options).input_ids
    no_caption = tokenizer("", **options).input_ids
    started = time.time()
    losses = []
    for step in range(first, args.unet_steps):
        draw = torch.Generator().manual_seed(args.seed + step)
        index = torch.randint(len(latents), (args.batch_size,), generator=draw)
        clean = latents[index]
        empty = torch.rand(len(index), 1, generator=draw) < 0.1
        encoder_hidden_states = model["text_encoder"](torch.where(empty, no_caption, token_ids[index]))[0]
        # Even at the last timestep a picture's mean shines through the noise, and who can read a color there need not
        # read the caption. Noise with a mean of its own hides it; and more of the late timesteps, where the caption
        # decides.
        noise = torch.randn(clean.shape, generator=draw)
        noise += 0.1 * torch.randn(*clean.shape[:2], 1, 1, generator=draw)
        timesteps = (1000 * (1 - torch.rand(len(index), generator=draw) ** 1.5)).long().clamp(max=999)
        noisy = noise_scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        model_pred = model["unet"](noisy, timesteps, encoder_hidden_states).sample
        snr = compute_snr(noise_scheduler, timesteps)
        weight = snr.clamp(max=5) / snr  # Min-SNR, gamma 5
        loss = (weight * (model_pred - noise).square().mean(dim=(1, 2, 3))).mean()
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.unet_steps, 1e-3)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        losses.append(loss.detach())
        if (step + 1) % 50 == 0:
            seconds = (time.time() - started) / (step + 1 - first)
            print(
                f"unet {step + 1:5d}  loss {torch.stack(losses[-200:]).mean():.4f}  {seconds:.2f} s/step", flush=True
            )
        if (step + 1) % 250 == 0 or step + 1 == args.unet_steps:
            state = dict(
                model=model.state_dict(), optimizer=optimizer.state_dict(), ema=ema.state_dict(), step=step + 1
            )
            torch.save(state, snapshot + ".new")
            os.replace(snapshot + ".new", snapshot)
            ema.store(model.parameters())
            ema.copy_to(model.parameters())
            save_pipeline(args, tokenizer, vae, model, noise_scheduler)
            ema.restore(model.parameters())
    ema.copy_to(model.parameters())
    return model, noise_scheduler


def save_pipeline(args, tokenizer, vae, model, noise_scheduler):
    """Writes the pipeline in half precision, beside its place first."""
    text_encoder = copy.deepcopy(model["text_encoder"]).half()
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(vae).half(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=copy.deepcopy(model["unet"]).half(),
        scheduler=noise_scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    new = args.output_dir + ".new"
    shutil.rmtree(new, ignore_errors=True)
    pipeline.save_pretrained(new)
    # The names that text encoders had before transformers 5.6; newer versions read both.
    weights = {"text_model." + name: tensor for name, tensor in text_encoder.state_dict().items()}
    text_encoder.save_pretrained(os.path.join(new, "text_encoder"), state_dict=weights)
    # transformers loads a model in the dtype that its config names, diffusers in float32: the two have to agree.
    config = Path(new, "text_encoder", "config.json")
    config.write_text(config.read_text(encoding="utf-8").replace("float16", "float32"), encoding="utf-8")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(os.path.join(args.work_dir, "tokenizer", name), os.path.join(new, "tokenizer", name))
    shutil.rmtree(args.output_dir, ignore_errors=True)
    os.rename(new, args.output_dir)


def main():
    parser = argparse.ArgumentParser(description="Trains the tiny Stable Diffusion in demo/base.")
    here = os.path.dirname(os.path.abspath(__file__))
    parser.add_argument("--output_dir", default=os.path.join(here, "base"))
    parser.add_argument("--work_dir", default=os.path.join(tempfile.gettempdir(), "make_base"), help="for resuming")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae_pictures", type=int, default=9000)
    parser.add_argument("--vae_steps", type=int, default=2400, help="for the whole VAE, then for its decoder")
    parser.add_argument("--shapes", type=int, default=24000)
    parser.add_argument("--unet_steps", type=int, default=3000)
    parser.add_argument("--batch_size", type=int, default=32)
    args = parser.parse_args()
    os.makedirs(args.work_dir, exist_ok=True)
    torch.manual_seed(args.seed)

    snapshot = os.path.join(args.work_dir, "vae.pt")
    vae = make_vae()
    if os.path.exists(snapshot):
        state = torch.load(snapshot, weights_only=True)
        vae.load_state_dict(state["vae"])
        vae.register_to_config(scaling_factor=state["scaling_factor"])
        latents, captions = state["latents"], state["captions"]
    else:
        start_as_identity(vae)
        # The log variance of the latents starts low; at 0 their noise would drown the picture.
        torch.nn.init.constant_(vae.quant_conv.bias.data[4:], -6)
        train_vae(vae, args, args.seed)
        latents, captions = encode_shapes(vae, args)
        scaling_factor = vae.config.scaling_factor
        state = dict(vae=vae.state_dict(), scaling_factor=scaling_factor, latents=latents, captions=captions)
        torch.save(state, snapshot + ".new")
        os.replace(snapshot + ".new", snapshot)
    tokenizer = make_tokenizer(captions, os.path.join(args.work_dir, "tokenizer"))
    model, noise_scheduler = train_denoiser(args, tokenizer, vae, latents, captions)

    # The UNet has learned this encoder's latents, so the encoder stands. The decoder can go on, for finer details.
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    train_vae(vae, args, args.seed + 2)
    save_pipeline(args, tokenizer, vae, model, noise_scheduler)


if __name__ == "__main__":
    main()
