"""textual_inversion.py: only the new rows move, what they come to, its flags; its resume, kill and signal."""

import os
import re
import shutil
import signal

import forked
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from helpers import (
    ROOT,
    WORD,
    encode,
    everything,
    files_of,
    flags_of,
    in_epochs,
    launch,
    linux,
    litter,
    logged,
    metrics,
    optimizer_state,
    rows,
    run,
    same,
    vectors,
    watch,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.models.clip.modeling_clip import CLIPMLP

import textual_inversion as script


WORDS = ("--placeholder_token", WORD, "--initializer_token", "red", "--num_vectors", 3)
FLAGS = (*WORDS, "--learning_rate", 1e-2, "--save_steps", 0)


@pytest.fixture
def train(trainer):
    """Trains three vectors on six pictures."""
    return trainer(script, *FLAGS)


@pytest.fixture(scope="module")
def plain_vectors(dropout_model, pictures, tmp_path_factory):
    """The output of a run with nothing but the flags that all have."""
    out = tmp_path_factory.mktemp("plain") / "out"
    run(script, *flags_of(dropout_model, pictures, out, *FLAGS))
    return out


@pytest.fixture
def seen(monkeypatch):
    """What runs load and train on."""
    return watch(monkeypatch, script)


def change_weights(folder, factor=1.01):
    """Multiplies all weights of a model."""
    (file,) = folder.glob("*.safetensors")
    save_file({n: t * factor for n, t in load_file(file).items()}, file, metadata={"format": "pt"})


# Numbers.


def test_the_loop_over_rows_by_hand(train, seen, tiny_model):
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
        for batch in seen.batches[2 * step : 2 * step + 2]:
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
    (batch,), models = seen.batches, seen.models
    scheduler = DDPMScheduler.from_pretrained(tiny_model / "scheduler")
    alpha = scheduler.alphas_cumprod[batch["timesteps"]].double()
    latents = (batch["mean"] + batch["std"] * batch["posterior_noise"]) * models.vae.config.scaling_factor
    a, s = (root.sqrt()[:, None, None, None].float() for root in (alpha, 1 - alpha))
    target = {"epsilon": batch["noise"], "v_prediction": a * batch["noise"] - s * latents, "sample": latents}
    with torch.no_grad():
        text = encode(script, models, batch["caption"])
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
    models, start = seen.models, CLIPTextModel.from_pretrained(tiny_model / "text_encoder").state_dict()
    after = models.pipeline.text_encoder.state_dict()
    rows = after.pop("embeddings.token_embedding.rows")
    after["embeddings.token_embedding.weight"] = after.pop("embeddings.token_embedding.table.weight")
    assert same(after, start)
    half = "bf16" in flags
    for name, cls in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        frozen = cls.from_pretrained(tiny_model / name).to(torch.bfloat16 if half and name == "unet" else None)
        assert same(getattr(models, name).state_dict(), frozen.state_dict()), name
    assert seen.dtypes == {torch.bfloat16 if half else torch.float32}
    assert rows.dtype == torch.float32 and torch.equal(rows.cpu(), vectors(out))
    ids = CLIPTokenizer.from_pretrained(tiny_model / "tokenizer")("red", add_special_tokens=False).input_ids
    assert (vectors(out) != start["embeddings.token_embedding.weight"][ids]).any(dim=1).all()
    assert not torch.equal(vectors(out), vectors(out).bfloat16().float())
    held = optimizer_state(out / "checkpoint-4")
    assert {path.split("/")[1] for path in held} == {"0"}  # the optimizer holds the vectors and nothing else
    assert {tensor.shape for tensor in held.values() if tensor.ndim > 1} <= {(3, 32)}
    assert all(tensor.dtype == torch.float32 for tensor in held.values() if tensor.ndim > 1)


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


# Flags.


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
    captions = {caption for batch in seen.batches for caption in batch["caption"]}
    tokens = f"{WORD} {WORD}_1 {WORD}_2"
    assert captions == {caption.format(tokens) for caption in script.CAPTIONS[kind]}
    tokenizer = seen.models.tokenizers[0]
    for caption in captions:
        ids = tokenizer(caption).input_ids
        assert [i - min(tokenizer.convert_tokens_to_ids([WORD])) for i in ids if i >= len(tokenizer) - 3] == [0, 1, 2]


class Stopped(Exception):
    """Ends a run where it would begin to train."""


@pytest.fixture
def resolved(tiny_model, pictures, tmp_path, monkeypatch):
    """A function that returns a run that would now begin to train."""

    def stop(begun, *rest):
        raise Stopped(begun)

    monkeypatch.setattr(script, "fill_cache", stop)

    def call(*flags):
        shutil.rmtree(tmp_path / "resolved", ignore_errors=True)
        words = in_epochs(flags_of(tiny_model, pictures, tmp_path / "resolved", *FLAGS, *flags))
        with pytest.raises(Stopped) as end:
            run(script, *words)
        return end.value.args[0]

    return call


def test_epochs_of_repeats(resolved):
    """An epoch is --repeats passes over six pictures, in steps of two; the defaults count steps."""
    begun = resolved()
    assert (begun.max_train_steps, begun.validation_steps) == (5000, 100)
    begun = resolved("--num_train_epochs", 2, "--repeats", 5, "--validation_epochs", 1)
    assert (begun.max_train_steps, begun.validation_steps) == (2 * 15, 15)
    begun = resolved("--num_train_epochs", 2, "--repeats", 3, "--train_batch_size", 4, "--validation_epochs", 3)
    assert (begun.max_train_steps, begun.validation_steps) == (2 * 5, 15)
    assert resolved("--num_train_epochs", 1).max_train_steps == 300
    assert resolved("--gradient_accumulation_steps", 2, "--num_train_epochs", 1).max_train_steps == 150
    begun = resolved("--num_train_epochs", 2, "--max_train_steps", 7, "--validation_steps", 3)
    assert (begun.max_train_steps, begun.validation_steps) == (7, 3)


def test_save_steps(train):
    """A copy of the vectors is written every --save_steps steps, and those of an overwritten run do not stay."""
    out = train("out", "--save_steps", 1, "--checkpointing_steps", 1)
    for step in range(1, 5):
        copy = vectors(out, f"learned_embeds-steps-{step}.safetensors")
        assert torch.equal(copy, vectors(out / f"checkpoint-{step}"))
    assert torch.equal(copy, vectors(out)) and len(list(out.glob("learned_embeds*"))) == 5
    train("out", "--save_steps", 3, "--overwrite_output_dir")
    assert {path.name for path in out.glob("learned_embeds-*")} == {"learned_embeds-steps-3.safetensors"}


def test_grids_of_one_prompt(train, seen):
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


def test_captions_and_other_files_are_not_read(train, pictures, tmp_path, capsys):
    """Pictures are all that is read of the folder: captions, and whatever is no picture, are only counted."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in pictures.glob("*.[jp]*g"):
        shutil.copy(file, bare)
    (bare / ".DS_Store").write_bytes(b"\0")
    (bare / "000.txt").write_bytes(b"\xff\xff not text")
    (bare / "metadata.jsonl").write_text("{torn")
    out = train("out", "--train_data_dir", bare)
    assert "passed over: 1 .txt, 1 .jsonl\n" in capsys.readouterr().out
    assert torch.equal(vectors(out), vectors(train("captioned")))


REFUSED = {
    "--train_data_dir: must be a path": ("--train_data_dir", ""),
    "--train_data_dir nowhere is not a folder": ("--train_data_dir", "nowhere"),
    "is not one word": ("--placeholder_token", "a pig"),
    "'' is not one word": ("--placeholder_token", ""),
    "--num_vectors: must be a number of type int from 1": ("--num_vectors", 0),
    "--repeats: must be": ("--repeats", 0),
    "--lr_num_cycles: must be": ("--lr_num_cycles", 0),
    "--num_validation_images: must be": ("--num_validation_images", -1),
    "--learnable_property: invalid choice": ("--learnable_property", "thing"),
    "--no_safe_serialization: it would write pickles": ("--no_safe_serialization",),
    "--tokenizer_name: the tokenizer must be the base model's": ("--tokenizer_name=x",),
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_flags(message, tmp_path, capsys):
    """Each is refused in a sentence before anything is loaded."""
    flags = [str(flag).format(data=tmp_path) for flag in REFUSED[message]]
    with pytest.raises(SystemExit) as end:
        script.parse_args(flags_of("owner/model", tmp_path, "out", *FLAGS, *flags))
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--placeholder_token", "--initializer_token", "--train_data_dir"])
def test_required_flags(flag, tmp_path, capsys):
    """Neither word has a default, nor have the pictures."""
    words = flags_of("owner/model", tmp_path, "out", *FLAGS)
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


# Resuming.


RICH = (
    *("--gradient_accumulation_steps", 2, "--train_batch_size", 1, "--max_train_steps", 6, "--checkpointing_steps", 1),
    *("--lr_scheduler", "cosine_with_restarts", "--lr_num_cycles", 2, "--lr_warmup_steps", 2, "--save_steps", 2),
    *("--learnable_property", "style", "--snr_gamma", 5, "--validation_samples", 1, "--validation_steps", 3),
)


@pytest.mark.parametrize("model, steps", [("dropout_model", [2, 5]), ("tiny_sdxl_model", [3])])
def test_resuming_the_vectors_is_exact(train, request, model, steps):
    """A run that is resumed ends with the same bits of vectors, moments and log."""
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


@pytest.mark.parametrize(
    "flags",
    [
        "--save_steps 1 --checkpointing_steps 3",
        "--save_as_full_pipeline",
        "--validation_prompt <pig> --validation_steps 1 --num_validation_images 1",
        "--num_train_epochs 3 --repeats 7",
    ],
)
def test_what_must_not_matter_to_the_vectors(train, dropout_model, plain_vectors, flags):
    """What is saved, drawn or cached along the way changes no bit of the vectors."""
    out = train("out", "--pretrained_model_name_or_path", dropout_model, *flags.split())
    assert torch.equal(vectors(out), vectors(plain_vectors)) and metrics(out, "loss") == metrics(plain_vectors, "loss")


def test_another_word_is_not_resumed(train, tiny_model, pictures, tmp_path):
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


# Processes.


@pytest.fixture(scope="module")
def command(dropout_model, pictures, cache):
    """A function that returns the flags of a run that checkpoints every step."""

    def flags(out, *more):
        base = ("--pretrained_model_name_or_path", dropout_model, "--encoding_cache_dir", cache)
        return flags_of(dropout_model, pictures, out, *FLAGS, *base, "--checkpointing_steps", 1, *more)

    return flags


@pytest.fixture(scope="module")
def uninterrupted(server, command, tmp_path_factory):
    """The output of a run of ten steps that nothing stopped, in a process like the others."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = forked.fork("textual_inversion", command(folder / "out", "--max_train_steps", 10), folder / "log")
    assert process.wait() == 0, process.output()
    return folder / "out"


@linux
@pytest.mark.launch
def test_a_kill_does_not_matter_to_the_vectors(start, command, uninterrupted, tmp_path):
    """The same command after kill -9, in the midst of a checkpoint, ends with the same bits."""
    out = tmp_path / "out"
    arguments = command(out, "--max_train_steps", 10, "--resume_from_checkpoint", "latest")
    trigger = (r"checkpoint-\d+", 40, ("kill", 0))
    killed = start(arguments, script="textual_inversion", watched=out, trigger=trigger)
    assert killed.wait() == -signal.SIGKILL, killed.output()
    assert 0 < len(list(out.glob("checkpoint-*"))) < 10
    again = start(arguments, script="textual_inversion")
    assert again.wait() == 0 and "Resuming from" in again.output(), again.output()
    assert torch.equal(vectors(out), vectors(uninterrupted)) and logged(out) == logged(uninterrupted)
    assert same(everything(out / "checkpoint-10"), everything(uninterrupted / "checkpoint-10"))
    assert litter(out) == []


@linux
@pytest.mark.launch
def test_sigterm_saves_the_vectors(start, command, uninterrupted, tmp_path):
    """SIGTERM ends a run with a checkpoint and 128 + 15, and the run goes on from there as if nothing had been."""
    out = tmp_path / "out"
    rare = ("--checkpointing_steps", 1000)
    process = start(command(out, "--max_train_steps", 2000, *rare), script="textual_inversion")
    process.until(lambda: rows(out) >= 2)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == 143 and "Traceback" not in process.output(), process.output()
    (checkpoint,) = out.glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert not (out / "learned_embeds.safetensors").exists()
    if step <= 10:
        assert same(everything(checkpoint), everything(uninterrupted / checkpoint.name))
    last = max(10, step + 1)
    again = command(out, "--max_train_steps", last, "--resume_from_checkpoint", "latest")
    process = start(again, script="textual_inversion")
    assert process.wait() == 0, process.output()
    if last == 10:
        assert torch.equal(vectors(out), vectors(uninterrupted))


@pytest.mark.launch
def test_two_processes_learn_as_one(train, tiny_model, pictures, tmp_path, monkeypatch):
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
    two = flags_of(tiny_model, pictures, tmp_path / "two", *FLAGS, *flags, "--train_batch_size", 1)
    said = launch(2, *two, script=tmp_path / "textual_inversion.py")
    assert said.count("The result is in") == 1
    two = tmp_path / "two"
    for name in ("loss", "grad_norm", "lr", "validation_loss"):
        assert metrics(two, name) == [(step, pytest.approx(value, rel=1e-4)) for step, value in metrics(one, name)]
    assert len(metrics(two, "validation_loss")) == 4
    torch.testing.assert_close(vectors(two), vectors(one), rtol=1e-3, atol=1e-5)
    names = {path.name for path in two.glob("learned_embeds*")}
    assert names == {f"learned_embeds{part}.safetensors" for part in ("", "-steps-2", "-steps-4")}
