"""textual_inversion.py: only the new rows move, what they come to, that resuming is exact, and what it leaves."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_pictures, metrics, run, same, weights
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from safetensors.torch import load_file, save_file
from test_exact import flat
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.models.clip.modeling_clip import CLIPMLP

import textual_inversion as script


WORD = "<pig>"
SMALL = "--resolution 32 --train_batch_size 2 --max_train_steps 4 --seed 1 --learning_rate 1e-2 --lr_warmup_steps 0"
FLAGS = (*SMALL.split(), "--center_crop", "--checkpointing_steps", 0, "--save_steps", 0, "--report_to", "none")
WORDS = ("--placeholder_token", WORD, "--initializer_token", "red", "--num_vectors", 3)


def flags_of(model, data, out, *flags):
    """The command line of a small run, as text."""
    places = ("--pretrained_model_name_or_path", model, "--train_data_dir", data, "--output_dir", out)
    return [str(flag) for flag in (*FLAGS, *WORDS, *places, *flags)]


@pytest.fixture
def train(tiny_model, pictures, tmp_path, monkeypatch):
    """A function that trains in this process, into a named folder that it returns; later flags win."""
    monkeypatch.setattr(script, "VALIDATION_STEPS", 2)

    def call(name, *flags):
        run(script, *flags_of(tiny_model, pictures, tmp_path / name, *flags))
        return tmp_path / name

    return call


@pytest.fixture(scope="session")
def dropout_model(tiny_model):
    """The tiny model with dropout in its text encoder, which draws from the global generator."""
    folder = shutil.copytree(tiny_model, tiny_model.with_name("tiny-text-dropout"))
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.2}))
    return folder


@pytest.fixture(scope="module")
def plain_run(dropout_model, pictures, tmp_path_factory):
    """The output of a run with nothing but the flags that all have."""
    out = tmp_path_factory.mktemp("plain") / "out"
    run(script, *flags_of(dropout_model, pictures, out))
    return out


@pytest.fixture
def seen(monkeypatch):
    """What a run loads and trains on: its models, and the growing list of the batches that it takes a loss of."""
    seen = {"models": None, "batches": [], "dtypes": set()}
    load_models, compute_loss = script.load_models, script.compute_loss

    def load(args):
        seen["models"] = load_models(args)
        return seen["models"]

    def compute(models, batch, args):
        seen["batches"].append(batch)
        seen["dtypes"] |= {parameter.dtype for parameter in models.unet.parameters()}
        return compute_loss(models, batch, args)

    monkeypatch.setattr(script, "load_models", load)
    monkeypatch.setattr(script, "compute_loss", compute)
    return seen


class Stopped(Exception):
    """Ends a run where it would begin to train."""


@pytest.fixture
def resolved(tiny_model, pictures, tmp_path, monkeypatch):
    """A function that returns the arguments as a run that would now begin to train has resolved them."""

    def stop(accelerator, args, *rest):
        raise Stopped(args)

    monkeypatch.setattr(script, "fill_cache", stop)

    def call(*flags):
        shutil.rmtree(tmp_path / "resolved", ignore_errors=True)
        words = [word for word in flags_of(tiny_model, pictures, tmp_path / "resolved", *flags)]
        place = words.index("--max_train_steps")
        with pytest.raises(Stopped) as end:
            run(script, *words[:place], *words[place + 2 :])
        return end.value.args[0]

    return call


def vectors(folder, name="learned_embeds.safetensors"):
    """The vectors in a folder."""
    (item,) = load_file(Path(folder, name)).items()
    assert item[0] == WORD and item[1].dtype == torch.float32
    return item[1]


def logged(out):
    """All logged numbers that are not about time or memory."""
    return [metrics(out, name) for name in ("loss", "lr", "grad_norm", "validation_loss")]


def optimizer_state(checkpoint):
    """The optimizer's tensors of a checkpoint, by the number of their parameter and their name."""
    state = flat(torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"])
    return {path: torch.as_tensor(value) for path, value in state.items() if not isinstance(value, str)}


def everything(checkpoint):
    """All tensors of a checkpoint."""
    return weights(checkpoint) | optimizer_state(checkpoint)


def change_weights(folder, factor=1.01):
    """Multiplies all weights of a model."""
    (file,) = folder.glob("*.safetensors")
    save_file({n: t * factor for n, t in load_file(file).items()}, file, metadata={"format": "pt"})


# Numbers


def test_the_loop_by_hand(train, seen, tiny_model):
    """Losses, norms and vectors are those of a plain loop that has a table of all rows, old and new."""
    settings = ("--adam_beta1", 0.8, "--adam_beta2", 0.95, "--adam_epsilon", 1e-6, "--adam_weight_decay", 1.0)
    accumulated = ("--train_batch_size", 1, "--gradient_accumulation_steps", 2, "--max_grad_norm", 0.001)
    out = train("out", *settings, *accumulated)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_model / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(tiny_model / "text_encoder")
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    scheduler = DDPMScheduler.from_pretrained(tiny_model / "scheduler")
    scaling_factor = AutoencoderKL.from_pretrained(tiny_model / "vae").config.scaling_factor
    table = text_encoder.get_input_embeddings().weight
    size, ids = len(table), tokenizer("red", add_special_tokens=False).input_ids
    new = table.detach()[ids].clone()
    assert len(ids) == 3 and tokenizer.add_tokens([WORD, f"{WORD}_1", f"{WORD}_2"]) == 3
    mean, square = torch.zeros_like(new), torch.zeros_like(new)
    losses, norms = [], []
    for step in range(4):
        whole = torch.nn.Parameter(torch.cat([table.detach(), new]))
        text_encoder.set_input_embeddings(torch.nn.Embedding(*whole.shape, _weight=whole))
        text_encoder.get_input_embeddings().weight = whole
        total = 0
        for batch in seen["batches"][2 * step : 2 * step + 2]:
            text = tokenizer(batch["caption"], padding="max_length", return_tensors="pt").input_ids
            assert (text >= size).sum() == 3
            latents = (batch["mean"] + batch["std"] * batch["posterior_noise"]) * scaling_factor
            noisy = scheduler.add_noise(latents, batch["noise"], batch["timesteps"])
            prediction = unet(noisy, batch["timesteps"], text_encoder(text).last_hidden_state).sample
            total = total + F.mse_loss(prediction, batch["noise"]) / 2
        (gradient,) = torch.autograd.grad(total, whole)
        gradient = gradient[size:]
        losses.append(total.item())
        norms.append(gradient.norm().item())
        gradient = gradient * min(1, 0.001 / norms[-1])
        mean, square = 0.8 * mean + 0.2 * gradient, 0.95 * square + 0.05 * gradient**2
        corrected = mean / (1 - 0.8 ** (step + 1)), square / (1 - 0.95 ** (step + 1))
        new = new * (1 - 1e-2) - 1e-2 * corrected[0] / (corrected[1].sqrt() + 1e-6)
    assert min(norms) > 0.001  # else nothing was clipped
    for name, wanted in (("loss", losses), ("grad_norm", norms)):
        assert metrics(out, name) == [(i + 1, pytest.approx(value, rel=1e-4)) for i, value in enumerate(wanted)]
    torch.testing.assert_close(vectors(out), new, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_snr_weights(train, seen, tiny_model, prediction_type):
    """The loss is min(snr, gamma) over what the prediction type already weighs (arXiv:2303.09556, section 3.4)."""
    flags = (
        "--prediction_type",
        prediction_type,
        "--snr_gamma",
        0.05,
        "--train_batch_size",
        6,
        "--max_train_steps",
        1,
    )
    out = train("out", *flags, "--learning_rate", 0)
    (batch,), models = seen["batches"], seen["models"]
    scheduler = DDPMScheduler.from_pretrained(tiny_model / "scheduler")
    alpha = scheduler.alphas_cumprod[batch["timesteps"]].double()
    latents = (batch["mean"] + batch["std"] * batch["posterior_noise"]) * models.vae.config.scaling_factor
    a, s = (root.sqrt()[:, None, None, None].float() for root in (alpha, 1 - alpha))
    target = {"epsilon": batch["noise"], "v_prediction": a * batch["noise"] - s * latents, "sample": latents}
    with torch.no_grad():
        text = script.encode_prompts(models, batch["caption"])
        noisy = a * latents + s * batch["noise"]
        prediction = models.unet(noisy, batch["timesteps"], text["encoder_hidden_states"]).sample
    each = (prediction - target[prediction_type]).square().mean(dim=(1, 2, 3)).double()
    snr = alpha / (1 - alpha)
    assert (snr > 0.05).any() and (snr < 0.05).any()
    weight = snr.clamp(max=0.05) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
    assert metrics(out, "loss") == [(1, pytest.approx((weight * each).mean().item(), rel=1e-4))]


def test_embeddings_are_a_longer_table():
    """The module gives what one table of old and new rows would, and the new rows the gradient they would have."""
    torch.manual_seed(0)
    table, rows = torch.nn.Embedding(50, 8).requires_grad_(False), torch.randn(3, 8)
    module = script.Embeddings(table, 48, rows)  # some tables have more rows than the tokenizer has tokens
    whole = torch.cat([table.weight[:48], rows]).requires_grad_()
    ids = torch.tensor([[0, 50, 47, 49], [48, 1, 50, 50]])
    factor = torch.randn(2, 4, 8)
    assert torch.equal(module(ids), F.embedding(ids, whole))
    (wanted,) = torch.autograd.grad((F.embedding(ids, whole) * factor).sum(), whole)
    (module(ids) * factor).sum().backward()
    assert torch.equal(module.rows.grad, wanted[48:])
    assert [name for name, parameter in module.named_parameters() if parameter.requires_grad] == ["rows"]


def test_no_step_copies_the_table():
    """Nothing in a forward and a backward pass is as large as the table, so that a large one costs nothing."""
    sizes = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (result if isinstance(result, tuple) else [result]) if torch.is_tensor(t))
            return result

    table = torch.nn.Embedding(5000, 8).requires_grad_(False)
    module = script.Embeddings(table, 5000, torch.randn(3, 8))
    with Record():
        module(torch.tensor([[0, 5000, 4999, 5002]])).sum().backward()
    assert len(sizes) > 5 and max(sizes) <= 4 * 8


@pytest.mark.parametrize("flags", [(), ("--use_8bit_adam",), ("--mixed_precision", "bf16")], ids=" ".join)
def test_only_the_vectors_move(train, seen, tiny_model, flags):
    """Table, text encoder, UNet and VAE stay bit for bit, whatever the weight decay; all new rows move."""
    out = train("out", *flags, "--adam_weight_decay", 10, "--checkpointing_steps", 4)
    models, start = seen["models"], CLIPTextModel.from_pretrained(tiny_model / "text_encoder").state_dict()
    after = models.pipeline.text_encoder.state_dict()
    rows = after.pop("embeddings.token_embedding.rows")
    after["embeddings.token_embedding.weight"] = after.pop("embeddings.token_embedding.table.weight")
    assert same(after, start)
    half = "bf16" in flags
    for name, cls in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        frozen = cls.from_pretrained(tiny_model / name).to(torch.bfloat16 if half and name == "unet" else None)
        assert same(getattr(models, name).state_dict(), frozen.state_dict()), name
    assert seen["dtypes"] == {torch.bfloat16 if half else torch.float32}
    assert rows.dtype == torch.float32 and torch.equal(rows.cpu(), vectors(out))
    ids = CLIPTokenizer.from_pretrained(tiny_model / "tokenizer")("red", add_special_tokens=False).input_ids
    assert (vectors(out) != start["embeddings.token_embedding.weight"][ids]).any(dim=1).all()
    assert not torch.equal(vectors(out), vectors(out).bfloat16().float())
    held = optimizer_state(out / "checkpoint-4")
    assert {path.split("/")[1] for path in held} == {"0"}  # the optimizer holds the vectors and nothing else
    assert {tensor.shape for tensor in held.values() if tensor.ndim > 1} <= {(3, 32)}
    assert all(tensor.dtype == torch.float32 for tensor in held.values() if tensor.ndim > 1)


def test_bf16_trains_alike(train, tiny_model):
    """bf16 rounds, so its first loss is near float32's but not equal, and its vectors go the same way."""
    full, half = train("full"), train("half", "--mixed_precision", "bf16")
    first, rounded = metrics(full, "loss")[0][1], metrics(half, "loss")[0][1]
    assert first != rounded == pytest.approx(first, rel=2e-2)
    start = vectors(train("start", "--learning_rate", 0))
    assert (vectors(full) - vectors(half)).norm() < 0.5 * (vectors(full) - start).norm()


def test_a_picture_is_learned(train, tmp_path):
    """The vectors lower the loss on fixed noise of a held-out copy of the one picture that they are trained on."""
    data = make_pictures(tmp_path / "one", count=1)
    shutil.copy(data / "000.png", data / "001.png")
    flags = ("--train_data_dir", data, "--validation_samples", 1, "--learning_rate", 0.1, "--no-random_flip")
    out = train("out", *flags, "--max_train_steps", 40, "--validation_steps", 40)
    (first, before), (last, after) = metrics(out, "validation_loss")
    assert (first, last) == (0, 40) and after < 0.99 * before


def test_gradient_checkpointing(train, monkeypatch):
    """It runs layers of the UNet and of the text encoder again for the backward pass, and changes nothing else."""
    train("cached")  # so that the VAE, which has such layers too, has run
    counts = {}
    for cls in (ResnetBlock2D, CLIPMLP):
        original = cls.forward

        def counting(self, *args, _original=original, **kwargs):
            counts[type(self)] = counts.get(type(self), 0) + 1
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(cls, "forward", counting)
    plain = train("plain")
    before = dict(counts)
    saving = train("saving", "--gradient_checkpointing")
    assert set(counts) == {ResnetBlock2D, CLIPMLP}
    assert all(counts[cls] - before[cls] > 1.5 * before[cls] for cls in counts)
    torch.testing.assert_close(vectors(saving), vectors(plain), rtol=1e-4, atol=1e-6)


# Flags


def test_vectors_start_from_the_initializer(train, tiny_model):
    """Row i starts as the embedding of the initializer's token i, in turn; all tables have the new names."""
    table = load_file(tiny_model / "text_encoder" / "model.safetensors")
    (table,) = (tensor for name, tensor in table.items() if name.endswith("token_embedding.weight"))
    tokenizer = CLIPTokenizer.from_pretrained(tiny_model / "tokenizer")
    for words, count in (("red", 1), ("ab", 5), ("a b c d", 3)):
        out = train(f"{words}-{count}", "--initializer_token", words, "--num_vectors", count, "--learning_rate", 0)
        ids = tokenizer(words, add_special_tokens=False).input_ids
        assert torch.equal(vectors(out), torch.stack([table[ids[i % len(ids)]] for i in range(count)]))


@pytest.mark.parametrize("kind, other", [("object", "style"), ("style", "object")])
def test_learnable_property(train, seen, kind, other):
    """Pictures draw from all of their property's captions, each with every new token once."""
    assert len({*script.CAPTIONS[kind]}) >= 12 and not {*script.CAPTIONS[kind][1:]} & {*script.CAPTIONS[other]}
    assert all(caption.count("{}") == 1 for caption in script.CAPTIONS[kind])
    train("out", "--learnable_property", kind, "--train_batch_size", 50, "--max_train_steps", 2, "--resolution", 16)
    captions = {caption for batch in seen["batches"] for caption in batch["caption"]}
    tokens = f"{WORD} {WORD}_1 {WORD}_2"
    assert captions == {caption.format(tokens) for caption in script.CAPTIONS[kind]}
    tokenizer = seen["models"].tokenizers[0]
    for caption in captions:
        ids = tokenizer(caption).input_ids
        assert [i - min(tokenizer.convert_tokens_to_ids([WORD])) for i in ids if i >= len(tokenizer) - 3] == [0, 1, 2]


def test_epochs(resolved):
    """An epoch is --repeats passes over six pictures, in steps of two; the defaults count steps."""
    args = resolved()
    assert (args.max_train_steps, args.validation_steps) == (5000, 100)
    args = resolved("--num_train_epochs", 2, "--repeats", 5, "--validation_epochs", 1)
    assert (args.max_train_steps, args.validation_steps) == (2 * 15, 15)
    args = resolved("--num_train_epochs", 2, "--repeats", 3, "--train_batch_size", 4, "--validation_epochs", 3)
    assert (args.max_train_steps, args.validation_steps) == (2 * 5, 15)
    assert resolved("--num_train_epochs", 1).max_train_steps == 300
    assert resolved("--gradient_accumulation_steps", 2, "--num_train_epochs", 1).max_train_steps == 150
    args = resolved("--num_train_epochs", 2, "--max_train_steps", 7, "--validation_steps", 3)
    assert (args.max_train_steps, args.validation_steps) == (7, 3)


def test_flips(train, seen):
    """Half of the samples are mirrored unless --no-random_flip says otherwise."""
    pixels = {}
    for flags in ((), ("--random_flip",), ("--no-random_flip",)):
        seen["batches"].clear()
        train(
            f"flips{''.join(flags)}",
            *flags,
            "--no_encoding_cache",
            "--train_batch_size",
            12,
            "--max_train_steps",
            2,
            "--resolution",
            16,
        )
        pixels[flags] = torch.cat([batch["pixel_values"] for batch in seen["batches"]])
    plain, flipped = pixels["--no-random_flip",], pixels["--random_flip",]
    assert torch.equal(pixels[()], flipped)
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(flipped, plain)]
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, flipped, plain)) and 4 < sum(mirrored) < 20


def test_learning_rates_restart(train):
    """--lr_num_cycles cosines follow each other, over optimizer steps."""
    flags = ("--lr_scheduler", "cosine_with_restarts", "--lr_num_cycles", 2, "--max_train_steps", 8)
    out = train("out", *flags, "--train_batch_size", 1, "--gradient_accumulation_steps", 2)
    wanted = [0.5 * (1 + math.cos(math.pi * (2 * step / 8 % 1))) for step in range(8)]
    assert metrics(out, "lr") == [(i + 1, pytest.approx(1e-2 * rate)) for i, rate in enumerate(wanted)]


def test_save_steps(train):
    """A copy of the vectors is written every --save_steps steps, and those of an overwritten run do not stay."""
    out = train("out", "--save_steps", 1, "--checkpointing_steps", 1)
    for step in range(1, 5):
        copy = vectors(out, f"learned_embeds-steps-{step}.safetensors")
        assert torch.equal(copy, vectors(out / f"checkpoint-{step}"))
    assert torch.equal(copy, vectors(out)) and len(list(out.glob("learned_embeds*"))) == 5
    train("out", "--save_steps", 3, "--overwrite_output_dir")
    assert {path.name for path in out.glob("learned_embeds-*")} == {"learned_embeds-steps-3.safetensors"}


def test_validation(train, seen):
    """The grid has --num_validation_images pictures of the prompt, which the vectors change."""
    flags = ("--validation_prompt", f"a {WORD}", "--num_validation_images", 3, "--validation_steps", 2)
    out = train("out", *flags, "--learning_rate", 1)
    grids = {path.name: Image.open(path) for path in (out / "samples").iterdir()}
    assert sorted(grids) == [f"step-{step:06d}.png" for step in (0, 2, 4)]
    assert all(grid.size == (96, 32) for grid in grids.values())
    assert len({grid.tobytes() for grid in grids.values()}) == 3
    last = grids["step-000004.png"]
    assert len({last.crop((x, 0, x + 32, 32)).tobytes() for x in (0, 32, 64)}) == 3
    assert f"- a {WORD}\n" in (out / "README.md").read_text()


def test_captions_and_other_files_are_not_read(train, pictures, tmp_path):
    """Pictures are all that is read of the folder: no captions, and nothing that is no picture."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in pictures.glob("*.[jp]*g"):
        shutil.copy(file, bare)
    (bare / ".DS_Store").write_bytes(b"\0")
    (bare / "000.txt").write_bytes(b"\xff\xff not text")
    (bare / "metadata.jsonl").write_text("{torn")
    out = train("out", "--train_data_dir", bare)
    assert torch.equal(vectors(out), vectors(train("captioned")))


REFUSED = {
    "give the folder of the pictures by --train_data_dir": ("--train_data_dir", ""),
    "--train_data_dir nowhere is not a folder": ("--train_data_dir", "nowhere"),
    "--output_dir lies in": ("--output_dir", "{data}/out"),
    "is not one word": ("--placeholder_token", "a pig"),
    "'' is not one word": ("--placeholder_token", ""),
    "--num_vectors: must be a number of type int from 1": ("--num_vectors", 0),
    "--repeats: must be": ("--repeats", 0),
    "--lr_num_cycles: must be": ("--lr_num_cycles", 0),
    "--num_validation_images: must be": ("--num_validation_images", 0),
    "--learnable_property: invalid choice": ("--learnable_property", "thing"),
    "--validation_steps or --validation_epochs, not both": ("--validation_steps", 1, "--validation_epochs", 1),
    "--no_safe_serialization: it would write pickles": ("--no_safe_serialization",),
    "--tokenizer_name: the tokenizer must be the base model's": ("--tokenizer_name=x",),
    "--local_rank: launchers": ("--local_rank", 0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_flags(message, tmp_path, capsys):
    """Each is refused in a sentence before anything is loaded."""
    flags = [str(flag).format(data=tmp_path) for flag in REFUSED[message]]
    with pytest.raises(SystemExit) as end:
        script.parse_args(flags_of("owner/model", tmp_path, "out", *flags))
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--placeholder_token", "--initializer_token"])
def test_required_flags(flag, tmp_path, capsys):
    """Neither word has a default."""
    words = flags_of("owner/model", tmp_path, "out")
    place = words.index(flag)
    with pytest.raises(SystemExit):
        script.parse_args(words[:place] + words[place + 2 :])
    assert flag in capsys.readouterr().err


def test_words_that_cannot_be(train, tiny_model):
    """A word that is known, an initializer without a token and too many vectors are refused in a sentence each."""
    full = train("full", "--save_as_full_pipeline", "--max_train_steps", 1)
    for message, flags in {
        "--placeholder_token a is known": ("--placeholder_token", "a"),
        "--placeholder_token <|endoftext|> is known": ("--placeholder_token", "<|endoftext|>"),
        "--placeholder_token <pig> is known": ("--pretrained_model_name_or_path", full),
        "--initializer_token ' ' has no token": ("--initializer_token", " "),
        "--initializer_token '<|endoftext|>' has no token": ("--initializer_token", "<|endoftext|>"),
        "--num_vectors 80 is ": ("--num_vectors", 80),
    }.items():
        with pytest.raises(SystemExit, match=re.escape(message)):
            train("refused", *flags)
    # A word whose second vector would take the name of a word that is there.
    flags = ("--save_as_full_pipeline", "--max_train_steps", 1, "--num_vectors", 1)
    other = train("other", *flags, "--placeholder_token", "<cow>_1")
    with pytest.raises(SystemExit, match="<cow> is known"):
        train("refused", "--pretrained_model_name_or_path", other, "--placeholder_token", "<cow>")
    # A word that is one token at its end, though its letters alone are none.
    with pytest.raises(SystemExit, match="background is known"):
        train(
            "refused", "--pretrained_model_name_or_path", ROOT / "demo" / "base", "--placeholder_token", "background"
        )
    fits = 77 - max(tokens_of(caption, tiny_model) for caption in script.CAPTIONS["object"])
    train("fits", "--num_vectors", fits, "--max_train_steps", 1)
    with pytest.raises(SystemExit, match="is 1 more than fit"):
        train("refused", "--num_vectors", fits + 1)


def tokens_of(caption, model):
    """How many tokens a caption has without the new ones, those at its ends included."""
    return len(CLIPTokenizer.from_pretrained(model / "tokenizer")(caption.format("")).input_ids)


def test_an_empty_folder(train, tmp_path):
    """A folder without pictures is refused."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty holds no pictures"):
        train("out", "--train_data_dir", tmp_path / "empty")


# Written anew from the documentation's commands for the script of the same name: flags, some as --flag=value.
DOCUMENTED = [
    "--pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5 --train_data_dir=./cat "
    "--learnable_property=object --placeholder_token=<cat-toy> --initializer_token=toy --resolution=512 "
    "--train_batch_size=1 --gradient_accumulation_steps=4 --max_train_steps=3000 --learning_rate=5.0e-04 --scale_lr "
    "--lr_scheduler=constant --lr_warmup_steps=0 --push_to_hub --output_dir=textual_inversion_cat",
]
DOCUMENTED += [f"{DOCUMENTED[0]} {more}" for more in (
    "--num_vectors 5",
    "--gradient_accumulation_steps=4",
    "--validation_prompt='A <cat-toy> train' --num_validation_images=4 --validation_steps=100",
    "--gradient_checkpointing --mixed_precision fp16",
    "--enable_xformers_memory_efficient_attention",
    "--checkpointing_steps 500 --resume_from_checkpoint latest",
    # Of SDXL's script.
    "--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 --mixed_precision=bf16 --resolution=768 "
    "--max_train_steps=500 --save_as_full_pipeline --output_dir=./textual_inversion_cat_sdxl",
)]  # fmt: skip
REFERENCE = """
    save_steps save_as_full_pipeline num_vectors pretrained_model_name_or_path revision variant tokenizer_name
    train_data_dir placeholder_token initializer_token learnable_property repeats output_dir seed resolution
    center_crop train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps gradient_checkpointing
    learning_rate scale_lr lr_scheduler lr_warmup_steps lr_num_cycles dataloader_num_workers adam_beta1 adam_beta2
    adam_weight_decay adam_epsilon push_to_hub hub_token hub_model_id logging_dir mixed_precision allow_tf32 report_to
    validation_prompt num_validation_images validation_steps validation_epochs local_rank checkpointing_steps
    checkpoints_total_limit resume_from_checkpoint enable_xformers_memory_efficient_attention no_safe_serialization
    use_8bit_adam
""".split()  # of both scripts: the last flag is of SDXL's


@pytest.mark.parametrize("command", DOCUMENTED)
def test_documented_commands(command, tmp_path, monkeypatch):
    """The commands in the reference's documentation are taken as they are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat").mkdir()
    args = script.parse_args(shlex.split(command))
    assert (args.placeholder_token, args.learning_rate, args.random_flip) == ("<cat-toy>", 5e-4, True)


def test_every_flag_of_the_reference(monkeypatch):
    """Each stands here under its name, or is refused with its reason."""
    assert len({*REFERENCE}) == 49
    added = set()
    original = script.argparse._ActionsContainer.add_argument
    monkeypatch.setattr(
        script.argparse._ActionsContainer,
        "add_argument",
        lambda self, *names, **kwargs: added.update(names) or original(self, *names, **kwargs),
    )
    with pytest.raises(SystemExit):
        script.parse_args([])
    assert {f"--{name}" for name in REFERENCE} - added == {*script.REFUSED}


# Resuming

RICH = (
    *("--gradient_accumulation_steps", 2, "--train_batch_size", 1, "--max_train_steps", 6, "--checkpointing_steps", 1),
    *("--lr_scheduler", "cosine_with_restarts", "--lr_num_cycles", 2, "--lr_warmup_steps", 2, "--save_steps", 2),
    *("--learnable_property", "style", "--snr_gamma", 5, "--validation_samples", 1, "--validation_steps", 3),
)


@pytest.mark.parametrize("model, steps", [("dropout_model", range(1, 7)), ("tiny_sdxl_model", [3])])
def test_resuming_is_exact_at_every_step(train, request, model, steps):
    """Whatever step a run is resumed at, it ends with the same bits of vectors, moments and log."""
    flags = (*RICH, "--pretrained_model_name_or_path", request.getfixturevalue(model))
    whole = train("whole", *flags)
    assert len({loss for _, loss in metrics(whole, "loss")}) == 6
    for step in steps:
        begun = whole.with_name(f"from-{step}") / f"checkpoint-{step}"
        shutil.copytree(whole / begun.name, begun)
        resumed = train(begun.parent.name, *flags, "--resume_from_checkpoint", "latest")
        for later in range(step + 1, 7):
            name = f"checkpoint-{later}"
            assert same(everything(resumed / name), everything(whole / name)), f"{name}, resumed at step {step}"
        assert logged(resumed) == logged(whole), f"resumed at step {step}"
        results = [{file.name: file.read_bytes() for file in out.glob("*.safetensors")} for out in (resumed, whole)]
        assert {name for name in results[1] if "steps" not in name} == {*files_of(model)}
        assert results[0].items() <= results[1].items(), (
            f"resumed at step {step}"
        )  # copies of earlier steps are not there
        assert results[0].keys() >= {*files_of(model)}


def test_dropout_draws(train, plain_run):
    """Dropout is on while training, or the test above would prove less than it says."""
    assert metrics(train("without"), "loss")[0] != metrics(plain_run, "loss")[0]


@pytest.mark.parametrize(
    "flags",
    [
        "--save_steps 1 --checkpointing_steps 3",
        "--save_as_full_pipeline",
        "--validation_prompt <pig> --validation_steps 1 --num_validation_images 1",
        "--dataloader_num_workers 1",
        "--no_encoding_cache",
        "--num_train_epochs 3 --repeats 7",
    ],
)
def test_what_must_not_matter(train, dropout_model, plain_run, flags):
    """What is saved, drawn or cached along the way changes no bit of the vectors."""
    out = train("out", "--pretrained_model_name_or_path", dropout_model, *flags.split())
    assert torch.equal(vectors(out), vectors(plain_run)) and metrics(out, "loss") == metrics(plain_run, "loss")


def test_another_run_is_not_resumed(train, tiny_model, pictures, tmp_path):
    """Another word, number of vectors, property, base or set of pictures is refused by name."""
    train("out", "--checkpointing_steps", 2)
    model, data = shutil.copytree(tiny_model, tmp_path / "model"), shutil.copytree(pictures, tmp_path / "data")
    change_weights(model / "unet")
    (data / "000.png").unlink()
    for what, flags in {
        "--placeholder_token": ("--placeholder_token", "<cow>"),
        "--num_vectors": ("--num_vectors", 2),
        "--learnable_property": ("--learnable_property", "style"),
        "base model": ("--pretrained_model_name_or_path", model),
        "data set": ("--train_data_dir", data),
        "--use_8bit_adam": ("--use_8bit_adam",),
    }.items():
        with pytest.raises(SystemExit, match=f"another {what}: "):
            train("out", *flags, "--max_train_steps", 6, "--resume_from_checkpoint", "latest")


# Processes

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's process calls")


@pytest.fixture(scope="module")
def command(dropout_model, pictures, tmp_path_factory):
    """A function that returns the flags of a run that checkpoints every step."""
    cache = tmp_path_factory.mktemp("cache")

    def flags(out, *more):
        base = ("--pretrained_model_name_or_path", dropout_model, "--encoding_cache_dir", cache)
        return flags_of(dropout_model, pictures, out, *base, "--checkpointing_steps", 1, *more)

    return flags


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory):
    """The output of a run of ten steps that nothing stopped, in a process like the others."""
    forked.start_server("textual_inversion")
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = forked.fork("textual_inversion", command(folder / "out", "--max_train_steps", 10), folder / "log")
    assert process.wait() == 0, process.output()
    return folder / "out"


@linux
@pytest.mark.launch
@pytest.mark.parametrize("count", [3, 14])
def test_a_kill_does_not_matter(count, command, uninterrupted, tmp_path):
    """The same command after kill -9, in the midst of a checkpoint or not, ends with the same bits."""
    out = tmp_path / "out"
    arguments = command(out, "--max_train_steps", 10, "--resume_from_checkpoint", "latest")
    trigger = (r"checkpoint-\d+", count * 6, ("kill", 0))
    killed = forked.fork("textual_inversion", arguments, tmp_path / "killed", watched=out, trigger=trigger)
    assert killed.wait() == -signal.SIGKILL, killed.output()
    assert 0 < len(list(out.glob("checkpoint-*"))) < 10
    again = forked.fork("textual_inversion", arguments, tmp_path / "again")
    assert again.wait() == 0 and "Resuming from" in again.output(), again.output()
    assert torch.equal(vectors(out), vectors(uninterrupted)) and logged(out) == logged(uninterrupted)
    assert same(everything(out / "checkpoint-10"), everything(uninterrupted / "checkpoint-10"))
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]


@linux
@pytest.mark.launch
def test_sigterm(command, uninterrupted, tmp_path):
    """SIGTERM ends a run with a checkpoint and 128 + 15, and the run goes on from there as if nothing had been."""
    out = tmp_path / "out"
    rare = ("--checkpointing_steps", 1000)
    process = forked.fork("textual_inversion", command(out, "--max_train_steps", 2000, *rare), tmp_path / "log")
    process.until(lambda: (out / "logs" / "metrics.jsonl").exists() and len(metrics(out, "loss")) >= 2)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == 143 and "Traceback" not in process.output(), process.output()
    (checkpoint,) = out.glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert not (out / "learned_embeds.safetensors").exists()
    if step <= 10:
        assert same(everything(checkpoint), everything(uninterrupted / checkpoint.name))
    last = max(10, step + 1)
    again = command(out, "--max_train_steps", last, "--resume_from_checkpoint", "latest")
    process = forked.fork("textual_inversion", again, tmp_path / "again")
    assert process.wait() == 0, process.output()
    if last == 10:
        assert torch.equal(vectors(out), vectors(uninterrupted))


@pytest.mark.launch
def test_two_processes_are_one(train, tiny_model, pictures, tmp_path, monkeypatch):
    """Two processes train as one, also where one has nothing to do in a validation; one writes."""
    # One draw of one held-out picture, so that a rank has none: no rank may wait for another's forward pass.
    text = (ROOT / "textual_inversion.py").read_text()
    (tmp_path / "textual_inversion.py").write_text(text.replace("VALIDATION_DRAWS = 4", "VALIDATION_DRAWS = 1"))
    monkeypatch.setattr(script, "VALIDATION_DRAWS", 1)
    flags = ("--gradient_accumulation_steps", 2, "--max_train_steps", 5, "--lr_scheduler", "cosine", "--save_steps", 2)
    flags += (
        "--validation_samples",
        1,
        "--validation_steps",
        2,
        "--checkpointing_steps",
        2,
        "--gradient_checkpointing",
    )
    one = train("one", *flags, "--train_batch_size", 2)
    two = flags_of(tiny_model, pictures, tmp_path / "two", *flags, "--train_batch_size", 1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    settings = {"env": environment, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([*launcher, str(tmp_path / "textual_inversion.py"), *two], **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("The result is in") == 1
    two = tmp_path / "two"
    for name in ("loss", "grad_norm", "lr", "validation_loss"):
        assert metrics(two, name) == [(step, pytest.approx(value, rel=1e-4)) for step, value in metrics(one, name)]
    assert len(metrics(two, "validation_loss")) == 4
    torch.testing.assert_close(vectors(two), vectors(one), rtol=1e-3, atol=1e-5)
    names = {path.name for path in two.glob("learned_embeds*")}
    assert names == {f"learned_embeds{part}.safetensors" for part in ("", "-steps-2", "-steps-4")}


# What is left


@pytest.fixture(scope="module")
def finished(tiny_model, pictures, tmp_path_factory):
    """The output folder of a run with the whole pipeline in it, in bf16."""
    out = tmp_path_factory.mktemp("finished") / "out"
    flags = ("--save_as_full_pipeline", "--mixed_precision", "bf16", "--checkpointing_steps", 2, "--save_steps", 3)
    run(script, *flags_of(tiny_model, pictures, out, *flags, "--learning_rate", 0.1))
    return out


def files_of(model):
    """The files that a run leaves of the vectors: one for each text encoder, and for SDXL one of both."""
    more = ["learned_embeds_2.safetensors", "learned_embeds_xl.safetensors"] if "sdxl" in str(model) else []
    return ["learned_embeds.safetensors", *more]


def load_files(base, folder, files):
    """The base model's pipeline with the vectors of a folder's files, each in the text encoder of its number."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    for name in files:
        if "_xl" not in name:  # which is for other programs
            part = "_2" if "_2" in name else ""
            parts = {kind: getattr(pipeline, f"{kind}{part}") for kind in ("text_encoder", "tokenizer")}
            pipeline.load_textual_inversion(folder, weight_name=name, **parts)
    return pipeline


def draw(pipeline, prompt):
    """A small picture from a fixed seed, as numbers."""
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "pt"}
    return pipeline(prompt, generator=torch.Generator().manual_seed(0), **settings).images[0]


def test_the_result_loads_in_diffusers(finished, tiny_model):
    """The file, a checkpoint and the whole pipeline give the word its vectors, and other words what they had."""
    base = StableDiffusionPipeline.from_pretrained(tiny_model)
    plain, unknown = draw(base, "a red one"), draw(base, f"a {WORD}")
    loaded = StableDiffusionPipeline.from_pretrained(tiny_model)
    loaded.load_textual_inversion(finished)
    whole = StableDiffusionPipeline.from_pretrained(finished)
    for pipeline in (loaded, whole):
        assert torch.equal(draw(pipeline, "a red one"), plain)
        assert not torch.equal(draw(pipeline, f"a {WORD}"), unknown)
        ids = pipeline.tokenizer(pipeline.maybe_convert_prompt(f"a {WORD} b", pipeline.tokenizer)).input_ids
        rows = pipeline.text_encoder.get_input_embeddings().weight[ids]
        assert torch.equal(rows[2:5], vectors(finished)) and len(ids) == 7
    assert torch.equal(draw(loaded, f"a {WORD}"), draw(whole, f"a {WORD}"))
    for folder, name in ((finished / "checkpoint-4", None), (finished, "learned_embeds-steps-3.safetensors")):
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
        pipeline.load_textual_inversion(folder, weight_name=name)
        same_as_last = torch.equal(draw(pipeline, f"a {WORD}"), draw(loaded, f"a {WORD}"))
        assert same_as_last == (name is None)
    assert {file.suffix for file in (finished / "checkpoint-4").iterdir()} == {
        ".json",
        ".jsonl",
        ".bin",
        ".safetensors",
    }


@pytest.mark.parametrize("model", ["tiny_model", "tiny_sdxl_model"])
def test_training_sees_what_the_pipeline_makes(train, seen, request, model):
    """A caption's embeddings are those that diffusers gives the prompt with the word in it."""
    base = request.getfixturevalue(model)
    out = train("out", "--learning_rate", 0.1, "--pretrained_model_name_or_path", base)
    models = seen["models"]
    pipeline = load_files(base, out, files_of(model))
    caption, prompt = (f"a picture of {tokens}" for tokens in (f"{WORD} {WORD}_1 {WORD}_2", WORD))
    settings = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with torch.no_grad():
        trained = script.encode_prompts(models, [caption])
        for each in (pipeline, models.pipeline):
            states, _, *pooled = each.encode_prompt(prompt, **settings)
            torch.testing.assert_close(trained["encoder_hidden_states"], states)
            assert len(pooled) == 2 * (model == "tiny_sdxl_model")
            if pooled:
                torch.testing.assert_close(trained["text_embeds"], pooled[0])


def test_the_whole_pipeline_is_the_base(finished, tiny_model):
    """It holds the base's float32 weights bit for bit, also after bf16, with the new rows at the end."""
    before, after = weights(tiny_model), weights(finished)
    for name, tensor in before.items():
        if name.endswith("token_embedding.weight"):
            assert torch.equal(after[name][: len(tensor)], tensor)
            assert torch.equal(after[name][len(tensor) :], vectors(finished))
        else:
            assert torch.equal(after[name], tensor), name


@pytest.fixture(scope="module")
def finished_sdxl(tiny_sdxl_model, pictures, tmp_path_factory):
    """The output folder of such a run on SDXL, and the models that it trained."""
    out, models, original = tmp_path_factory.mktemp("finished") / "out", [], script.load_models
    flags = ("--save_as_full_pipeline", "--mixed_precision", "bf16", "--checkpointing_steps", 2, "--save_steps", 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "load_models", lambda args: models.append(original(args)) or models[0])
        more = ("--learning_rate", 0.1, "--adam_weight_decay", 1)
        run(script, *flags_of(tiny_sdxl_model, pictures, out, *flags, *more))
    return out, models[0]


def test_sdxls_files_load_in_diffusers(finished_sdxl, tiny_sdxl_model):
    """Each file gives its text encoder the word; both are the whole pipeline; other words keep what they had."""
    out, _ = finished_sdxl
    first, second, both = files_of(tiny_sdxl_model)
    base = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_model)
    plain, unknown = draw(base, "a red one"), draw(base, f"a {WORD}")
    pictures = {}
    for files in ([first], [second], [first, second]):
        pipeline = load_files(tiny_sdxl_model, out, files)
        assert torch.equal(draw(pipeline, "a red one"), plain)
        pictures[len(pictures)] = draw(pipeline, f"a {WORD}")
    assert len({picture.numpy().tobytes() for picture in (unknown, *pictures.values())}) == 4
    whole = StableDiffusionXLPipeline.from_pretrained(out)
    assert torch.equal(draw(whole, f"a {WORD}"), pictures[2]) and torch.equal(draw(whole, "a red one"), plain)
    assert same(load_file(out / both), {"clip_l": vectors(out, first), "clip_g": vectors(out, second)})
    for name in (first, second):
        assert torch.equal(vectors(out / "checkpoint-4", name), vectors(out, name))
        copy = vectors(out, name.replace(".", "-steps-3."))
        assert copy.shape == vectors(out, name).shape and not torch.equal(copy, vectors(out, name))


def test_only_sdxls_vectors_move(finished_sdxl, tiny_sdxl_model):
    """Both tables and encoders stay bit for bit, in memory and in the whole pipeline; all new rows move."""
    out, models = finished_sdxl
    before, after = weights(tiny_sdxl_model), weights(out)
    for part, encoder, name in zip(script.TEXT_ENCODERS, models.text_encoders, files_of(tiny_sdxl_model)):
        (table,) = (
            f"{part}/{key}" for key in weights(tiny_sdxl_model / part) if key.endswith("token_embedding.weight")
        )
        embeddings = encoder.get_input_embeddings()
        assert torch.equal(embeddings.table.weight, before[table])
        assert torch.equal(after[table], torch.cat([before[table], vectors(out, name)]))
        assert torch.equal(embeddings.rows, vectors(out, name))
        tokenizer = CLIPTokenizer.from_pretrained(tiny_sdxl_model / part.replace("text_encoder", "tokenizer"))
        ids = tokenizer("red", add_special_tokens=False).input_ids
        assert (vectors(out, name) != before.pop(table)[ids]).any(dim=1).all()
        start = type(encoder).from_pretrained(tiny_sdxl_model / part).state_dict()
        now = {key.replace(".table.", "."): t for key, t in encoder.state_dict().items() if not key.endswith(".rows")}
        assert same(now, start), part
    assert same({name: after[name] for name in before}, before)
    held = [tensor.shape for tensor in optimizer_state(out / "checkpoint-4").values() if tensor.ndim > 1]
    assert sorted({*held}) == [(3, 32), (3, 48)]


def test_without_the_flag_there_is_no_pipeline(train):
    """The result is the file alone, of some hundred bytes, with its card."""
    out = train("out")
    assert {path.name for path in out.iterdir()} == {
        "README.md", "learned_embeds.safetensors", "logs", "samples", "train_args.yaml",
    }  # fmt: skip
    assert (out / "learned_embeds.safetensors").stat().st_size < 1000


@pytest.mark.parametrize("model", ["tiny_model", "tiny_sdxl_model"])
@pytest.mark.parametrize("flags", [(), ("--save_as_full_pipeline",)], ids=["file", "pipeline"])
def test_the_lines_that_load_it(train, seen, request, tmp_path, monkeypatch, capsys, model, flags):
    """Those printed at the end make a picture; those in the card name no folder of this machine."""
    base = request.getfixturevalue(model)
    out = train("out", *flags, "--max_train_steps", 1, "--pretrained_model_name_or_path", base)
    code = capsys.readouterr().out.split("To load it:")[1].replace("width=32", "width=32, num_inference_steps=2")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert Image.open(tmp_path / "picture.png").size == (32, 32)
    tokenizers = [part for name, part in names["pipeline"].components.items() if name.startswith("tokenizer")]
    assert len(tokenizers) == 1 + (model == "tiny_sdxl_model")
    assert [len(tokenizer.tokenize(WORD)) for tokenizer in tokenizers] == [1] * len(tokenizers)
    card = (out / "README.md").read_text()
    assert str(tmp_path.parent) not in card and (f"'{base.name}'" in card) == (not flags) and "'out'" in card
    if not flags:  # also where the folder's name is all that was given
        args = script.parse_args(["--config", str(out / "train_args.yaml"), "--output_dir", "out"])
        assert str(tmp_path.parent) not in script.loading_code(args, seen["models"], "out")


def test_push(hub, train):
    """What is uploaded is the result and its card: no checkpoints, no logs, no arguments."""
    flags = ("--push_to_hub", "--hub_token", "hf_secret", "--checkpointing_steps", 2, "--save_steps", 3)
    out = train("out", *flags, "--validation_prompt", WORD, "--num_validation_images", 1)
    files = hub.repos["me/out"]["files"]
    grids = {f"samples/step-{step:06d}.png" for step in (0, 4)}
    assert {*files} - {".gitattributes"} == {
        "README.md", "learned_embeds.safetensors", "learned_embeds-steps-3.safetensors", *grids
    }  # fmt: skip
    assert files["learned_embeds.safetensors"] == (out / "learned_embeds.safetensors").read_bytes()
    assert b"load_textual_inversion('me/out')" in files["README.md"]
    whole = train("whole", *flags, "--save_as_full_pipeline")
    files = hub.repos["me/whole"]["files"]
    local = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    assert {*files} - {".gitattributes"} == {
        name for name in local if not name.startswith(("checkpoint-", "logs/", "train_args"))
    }
