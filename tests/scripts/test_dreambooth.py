"""What train_dreambooth.py adds: a trained text encoder, captions, its own flags; its resume, kill and signal."""

import fnmatch
import functools
import json
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from helpers import (
    INSTANCE,
    count_calls,
    drift,
    everything,
    files_in,
    finish,
    flags_of,
    linux,
    litter,
    logged,
    losses,
    metrics,
    prior,
    rows,
    run,
    same,
    watch,
    weights,
    whole_checkpoints,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel

import train_dreambooth as script


LOSSES = ("loss", "instance_loss", "prior_loss", "grad_norm", "validation_loss")
# Both models trained, prior preservation, and whatever draws or counts something.
RICH = "--train_text_encoder --train_batch_size 1 --gradient_accumulation_steps 2 --random_flip --snr_gamma 5"
RICH += " --proportion_empty_prompts 0.3 --lr_scheduler constant_with_warmup --lr_warmup_steps 2"
RICH = (*RICH.split(), "--validation_samples", 1, "--validation_steps", 2)
STEPS = ("--max_train_steps", 6, "--checkpointing_steps", 1)


@pytest.fixture(scope="session")
def command(tiny_model, subject, cache):
    """Returns the flags of a small run on a subject; later flags win."""

    def flags(out, *more):
        places = ("--max_train_steps", 2, "--encoding_cache_dir", cache, "--instance_prompt", INSTANCE)
        return flags_of(tiny_model, None, out, "--instance_data_dir", subject, *places, *more)

    return flags


@pytest.fixture
def train(trainer, subject, cache):
    """Trains two steps on a subject."""
    places = ("--instance_data_dir", subject, "--encoding_cache_dir", cache, "--instance_prompt", INSTANCE)
    return trainer(script, "--max_train_steps", 2, *places)


@pytest.fixture(scope="module")
def rich(command, classes, tmp_path_factory):
    """A run with everything that draws or is counted, which others are compared with."""
    out = tmp_path_factory.mktemp("rich") / "out"
    run(script, *command(out, *RICH, *prior(classes), *STEPS))
    return out


# Numbers and models.


@pytest.mark.parametrize(
    "flags, rates",
    [
        ("--lr_scheduler polynomial --lr_power 2", [1, 0.5625, 0.25, 0.0625]),
        ("--lr_scheduler cosine_with_restarts --lr_num_cycles 2", [1, 0.5, 1, 0.5]),
    ],
)
def test_learning_rates_of_more_schedules(train, flags, rates):
    """--lr_power and --lr_num_cycles shape the learning rate; polynomial ends at 1e-7."""
    out = train("out", *flags.split(), "--max_train_steps", 4)
    assert [rate for _, rate in metrics(out, "lr")] == [pytest.approx(1e-3 * rate, rel=2e-3) for rate in rates]


def test_a_frozen_text_encoder_runs_once_a_prompt(train, classes, monkeypatch, tiny_model, tmp_path):
    """The instance prompt is encoded once in a run, the class prompt too, and by the next run neither."""
    texts = count_calls(monkeypatch, CLIPTextModel, "forward")
    images = count_calls(monkeypatch, AutoencoderKL, "encode")
    flags = ("--max_train_steps", 4, "--encoding_cache_dir", tmp_path / "cache")
    out = train("alone", *flags)
    assert (len(texts), len(images)) == (1, 5)
    train("with-class", *flags, *prior(classes))
    assert (len(texts), len(images)) == (2, 5 + 8)
    again = train("again", *flags, "--pre_compute_text_embeddings", "--set_grads_to_none")
    assert (len(texts), len(images)) == (2, 5 + 8)
    assert same(weights(out), weights(again))
    for part in ("vae", "text_encoder"):
        assert same(weights(out / part), weights(tiny_model / part))
    assert not same(weights(out / "unet"), weights(tiny_model / "unet"))


def test_a_trained_text_encoder_is_saved(rich, tiny_model):
    """Both models leave changed in float32 and the VAE as it came; result and last checkpoint draw the same."""
    for part in ("unet", "text_encoder"):
        trained, base = weights(rich / part), weights(tiny_model / part)
        assert trained.keys() == base.keys() and not any(torch.equal(trained[name], base[name]) for name in base)
        assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
        assert same(trained, weights(rich / "checkpoint-6" / part))
    assert same(weights(rich / "vae"), weights(tiny_model / "vae"))
    unet = UNet2DConditionModel.from_pretrained(rich / "checkpoint-6" / "unet")
    text_encoder = CLIPTextModel.from_pretrained(rich / "checkpoint-6" / "text_encoder")
    checkpoint = StableDiffusionPipeline.from_pretrained(tiny_model, unet=unet, text_encoder=text_encoder)
    pictures = []
    for pipeline in (checkpoint, StableDiffusionPipeline.from_pretrained(rich)):
        pipeline.set_progress_bar_config(disable=True)
        settings = {"generator": torch.Generator().manual_seed(0), "output_type": "np", "num_inference_steps": 2}
        pictures.append(pipeline(INSTANCE, height=32, width=32, **settings).images[0])
    assert np.array_equal(*pictures) and pictures[0].std() > 0


def test_what_is_published_is_whole(rich, tmp_path):
    """The files that go to the Hub are those of a pipeline, with its card; the card says how to draw the subject."""
    for file in (path for path in rich.rglob("*") if path.is_file()):
        name = str(file.relative_to(rich))
        if any(fnmatch.fnmatch(name, pattern) for pattern in script.PUBLISHED):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / name)
    parts = {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert {path.name for path in tmp_path.iterdir()} == parts | {"README.md", "model_index.json"}
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert same(pipeline.text_encoder.state_dict(), CLIPTextModel.from_pretrained(rich / "text_encoder").state_dict())
    card = (tmp_path / "README.md").read_text()
    assert f"prompt = {INSTANCE!r}" in card and "- dreambooth" in card and "| prior_loss_weight | 1.0 |" in card


def test_modes_and_validation(train, classes, rich, monkeypatch):
    """Both models train in train mode and are validated in eval mode; pictures and their sampler change no weight."""
    samplers = []
    draw_picture = script.draw_picture

    def watching(run, models, prompt, generator, scheduler):
        modes = models.pipeline.text_encoder.training, models.pipeline.unet.training
        samplers.append((type(scheduler).__name__, prompt, *modes))
        return draw_picture(run, models, prompt, generator, scheduler)

    monkeypatch.setattr(script, "draw_picture", watching)
    seen = watch(monkeypatch, script)
    flags = (*RICH, *prior(classes), *STEPS, "--max_train_steps", 2, "--validation_steps", 1)
    flags += ("--validation_prompt", "sks", "--num_validation_images", 3)
    for scheduler in ("DDPMScheduler", "DPMSolverMultistepScheduler"):
        out = train(scheduler, *flags, "--validation_scheduler", scheduler)
        assert samplers == 9 * [(scheduler, "sks", False, False)]
        samplers.clear()
    assert everything(out / "checkpoint-2").keys() == everything(rich / "checkpoint-2").keys()
    assert same(everything(out / "checkpoint-2"), everything(rich / "checkpoint-2"))
    assert metrics(out, "validation_loss")[::2] == metrics(rich, "validation_loss")[:2]
    for modes, batch, result in zip(seen.modes, seen.batches, seen.losses):
        assert modes == [len(batch["timesteps"]) > 1] * 2
        assert ("prior_loss" in result) is (len(batch["timesteps"]) > 1)
    assert Image.open(out / "samples" / "step-000002.png").size == (3 * 32, 32)
    assert Image.open(out / "samples" / "step-000000.png").size == (3 * 32, 32)
    assert StableDiffusionPipeline.from_pretrained(out).scheduler.__class__.__name__ == "DDIMScheduler"


def test_gradient_checkpointing_changes_nothing(train, classes, rich, monkeypatch):
    """Both models recompute their activations, and the losses are the same."""
    seen = watch(monkeypatch, script)
    out = train("out", *RICH, *prior(classes), *STEPS, "--max_train_steps", 3, "--gradient_checkpointing")
    for name in LOSSES[:-1]:
        assert metrics(out, name) == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in metrics(rich, name)[:3]]
    pipeline = seen.models.pipeline
    assert pipeline.unet.is_gradient_checkpointing and pipeline.text_encoder.is_gradient_checkpointing


def test_8bit_adam_and_bf16(train, classes, tiny_model):
    """8-bit AdamW under bf16 trains both models in float32."""
    flags = (*RICH, *prior(classes), "--use_8bit_adam", "--mixed_precision", "bf16", "--checkpointing_steps", 2)
    out = train("out", *flags)
    for part in ("unet", "text_encoder"):
        assert not same(weights(out / part), weights(tiny_model / part))
        assert {tensor.dtype for tensor in weights(out / part).values()} == {torch.float32}
    assert any(tensor.dtype == torch.uint8 for tensor in everything(out / "checkpoint-2").values())


# Resuming.


def assert_ends_alike(out, rich, step=6):
    """Asserts that a checkpoint of a resumed run holds the bits of the run that nothing stopped."""
    name = f"checkpoint-{step}"
    assert same(everything(out / name), everything(rich / name))
    assert losses(out / name) == losses(rich / name)
    assert {key.split("/")[0] for key in weights(out / name)} == {"unet", "text_encoder"}


@pytest.mark.parametrize("step", [1, 4])
def test_resuming_both_models_is_exact(train, classes, rich, tmp_path, step):
    """A run that is resumed ends with the same bits of both models, the optimizer and the log."""
    shutil.copytree(rich / f"checkpoint-{step}", tmp_path / "out" / f"checkpoint-{step}")
    out = train("out", *RICH, *prior(classes), *STEPS, "--resume_from_checkpoint", "latest")
    for later in range(step + 1, 7):
        assert_ends_alike(out, rich, later)
    assert logged(out) == logged(rich)
    assert same(weights(out / "unet"), weights(rich / "unet"))
    assert same(weights(out / "text_encoder"), weights(rich / "text_encoder"))


def test_resuming_both_text_encoders(train, tiny_sdxl_model):
    """DreamBooth trains both of SDXL's text encoders, keeps both in a checkpoint, and goes on with their bits."""
    flags = ("--train_text_encoder", "--gradient_checkpointing", "--resolution", 16, "--checkpointing_steps", 2)
    flags += ("--pretrained_model_name_or_path", tiny_sdxl_model, "--max_train_steps", 4)
    whole = train("whole", *flags)
    train("out", *flags, "--max_train_steps", 2)
    out = train("out", *flags, "--resume_from_checkpoint", "latest")
    assert same(weights(out), weights(whole)) and metrics(out, "loss") == metrics(whole, "loss")
    for part in ("unet", "text_encoder", "text_encoder_2"):
        assert not same(weights(out / part), weights(tiny_sdxl_model / part)), part
        assert (out / "checkpoint-2" / part).is_dir()
    picture = StableDiffusionXLPipeline.from_pretrained(out)("sks", height=16, width=16, num_inference_steps=2).images
    assert picture[0].size == (16, 16)


def test_another_subject_is_not_resumed(train, classes, rich, tmp_path, subject):
    """Another method, prompt or set of class pictures is another run, and is refused in a sentence."""
    shutil.copytree(rich / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    flags = (*RICH, *prior(classes), *STEPS, "--resume_from_checkpoint", "latest")
    fewer = shutil.copytree(classes, tmp_path / "fewer")
    (fewer / "000.png").write_bytes((fewer / "001.png").read_bytes())
    for more, what in (
        (("--no-train_text_encoder",), "--train_text_encoder"),
        (("--instance_prompt", "another"), "data set"),
        (("--class_prompt", "another"), "data set"),
        (("--num_class_images", 7), "data set"),
        (("--class_data_dir", fewer), "data set"),
    ):
        with pytest.raises(SystemExit, match=f"another {what}"):
            train("out", *flags, *more)
    with pytest.raises(SystemExit, match="another --with_prior_preservation"):
        train("out", *RICH, *STEPS, "--resume_from_checkpoint", "latest")


# Processes.


@linux
@pytest.mark.launch
def test_a_kill_does_not_matter_to_both_models(start, command, classes, rich, tmp_path):
    """A run that is killed as it writes its third checkpoint goes on from the second and ends with the same bits."""
    begin = functools.partial(start, script="train_dreambooth")
    arguments = command(tmp_path / "out", *RICH, *prior(classes), *STEPS, "--resume_from_checkpoint", "latest")
    killed = begin(arguments, watched=tmp_path / "out", trigger=(r"checkpoint-3", 4, ("kill", 0)))
    assert killed.wait() == -signal.SIGKILL and whole_checkpoints(tmp_path / "out") == [1, 2]
    assert f"Resuming from {tmp_path}/out/checkpoint-2." in finish(begin, arguments)
    assert whole_checkpoints(tmp_path / "out") == [1, 2, 3, 4, 5, 6] and litter(tmp_path) == []
    assert_ends_alike(tmp_path / "out", rich)
    assert same(weights(tmp_path / "out" / "text_encoder"), weights(rich / "text_encoder"))


@linux
@pytest.mark.launch
def test_sigterm_saves_both_models(start, command, classes, rich, tmp_path):
    """SIGTERM ends the run with 143 after its step, whose checkpoint has both models and goes on exactly."""
    out = tmp_path / "out"
    long = command(out, *RICH, *prior(classes), "--max_train_steps", 2000, "--validation_samples", 1)
    begin = functools.partial(start, script="train_dreambooth")
    process = begin([*long, "--checkpointing_steps", "1000"])
    process.until(lambda: rows(out))
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == 143
    (step,) = whole_checkpoints(out)
    assert step < 6, "the machine was too slow to stop it in time"
    assert_ends_alike(out, rich, step)
    finish(begin, command(out, *RICH, *prior(classes), *STEPS, "--resume_from_checkpoint", "latest"))
    assert_ends_alike(out, rich)


@linux
@pytest.mark.launch
def test_two_processes_draw_and_train_as_one(start, command, tiny_sdxl_model, monkeypatch, tmp_path):
    """Two processes draw the class pictures that one draws and train as it does, even if just one has to validate.

    Under SDXL, whose first text encoder has a last layer that nothing is learnt from.
    """
    (tmp_path / "few_draws.py").write_text(
        "import train_dreambooth\n\n"
        "train_dreambooth.VALIDATION_DRAWS = 1\n"
        "main, parse_args = train_dreambooth.main, train_dreambooth.parse_args\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(script, "VALIDATION_DRAWS", 1)
    flags = (*RICH, *STEPS, "--max_train_steps", 3, "--validation_steps", 1, "--sample_batch_size", 1)
    flags += ("--gradient_accumulation_steps", 2, "--pretrained_model_name_or_path", tiny_sdxl_model)
    both = [(*flags, *prior(tmp_path / f"class-{name}", 2)) for name in ("one", "two")]
    run(script, *command(tmp_path / "one", *both[0], "--train_batch_size", 2))

    said = finish(functools.partial(start, script="few_draws"), command(tmp_path / "two", *both[1]), 2)
    drawn = [files_in(tmp_path / f"class-{name}") for name in ("one", "two")]
    assert drawn[0] == drawn[1] and len(set(drawn[0].values())) == 2
    one, two = tmp_path / "one", tmp_path / "two"
    for name in LOSSES:
        assert metrics(two, name) == [(step, pytest.approx(value, rel=1e-4)) for step, value in metrics(one, name)]
    assert [step for step, _ in metrics(two, "validation_loss")] == [0, 1, 2, 3]
    assert drift(one, two, tiny_sdxl_model) < 1e-3 and said.count("The result is in") == 1
    for part in ("text_encoder", "text_encoder_2"):
        first, second = (load_file(folder / part / "model.safetensors") for folder in (one, two))
        for name, tensor in first.items():
            torch.testing.assert_close(tensor, second[name], rtol=0, atol=2e-5)


# Captions and flags.


def parsed(*flags):
    """The arguments of a command line that gives what a run cannot do without."""
    base = ("--pretrained_model_name_or_path", "owner/model", "--instance_data_dir", ".")
    base += ("--output_dir", "../out")
    return script.parse_args([str(flag) for flag in (*base, "--instance_prompt", INSTANCE, *flags)])


def test_a_caption_that_cannot_be_read_is_not_the_prompt(trainer, subject, tmp_path):
    """A picture whose caption became unreadable is bad, also if the picture was checked before, and has no other."""
    folder = shutil.copytree(subject, tmp_path / "subject")
    train = trainer(script, "--instance_data_dir", folder, "--instance_prompt", INSTANCE, "--max_train_steps", 1)
    (folder / "000.txt").write_text("a café", encoding="utf-8")
    train("out")
    (folder / "000.txt").write_text("a café", encoding="latin-1")
    with pytest.raises(
        SystemExit, match="1 of 5 pictures cannot be used:\n.*000.png has a caption in 000.txt that cannot"
    ):
        train("again")


def test_captions_beside_the_prompt(subject, tmp_path):
    """A picture's own caption, in a metadata file or beside it, goes before --instance_prompt."""
    folder = shutil.copytree(subject, tmp_path / "subject")
    names = sorted(file.name for file in folder.iterdir())
    rows = [{"file_name": names[0], "text": "by metadata"}, {"file_name": names[1], "text": ["one", "two"]}]
    rows += [{"file_name": names[2], "text": " "}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / names[3]).with_suffix(".txt").write_text("by text file\n")
    (folder / "notes.txt").write_text("no caption of any picture")
    (folder / "METADATA.CSV").write_text(f"file_name,text\n{names[1]},three\n")
    records = script.read_records(parsed("--instance_data_dir", folder))
    captions = [["by metadata"], ["three", "one", "two"], [INSTANCE], ["by text file"], [INSTANCE]]
    assert [record["captions"] for record in records] == captions
    assert [record["name"] for record in records] == [str(folder / name) for name in names]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty holds no pictures"):
        script.read_records(parsed("--instance_data_dir", tmp_path / "empty"))


MISTAKES = {
    "--instance_data_dir nowhere": "--instance_data_dir nowhere",
    "--with_prior_preservation --class_prompt x": "--class_data_dir",
    "--with_prior_preservation --class_data_dir ../class": "--class_prompt",
    "--class_data_dir ../class": "--with_prior_preservation",
    "--class_prompt x": "--with_prior_preservation",
    "--with_prior_preservation --class_prompt x --class_data_dir .": "may lie in",
    "--with_prior_preservation --class_prompt x --class_data_dir new/class": "may lie in",
    "--with_prior_preservation --class_prompt x --class_data_dir ..": "may lie in",
    "--with_prior_preservation --class_prompt x --class_data_dir ../file": "file is a file",
    "--train_text_encoder --pre_compute_text_embeddings": "not both",
    "--num_class_images 0": "--num_class_images",
    "--sample_batch_size 0": "--sample_batch_size",
    "--prior_loss_weight -1": "--prior_loss_weight",
    "--prior_generation_precision fp8": "bf16",
    "--num_validation_images -1": "--num_validation_images",
    "--validation_scheduler DDIM": "DDPMScheduler",
    "--lr_num_cycles 0": "--lr_num_cycles",
    "--lr_power nan": "--lr_power",
    **{f"{flag} 1": script.REFUSED[flag] for flag in script.REFUSED},
    **{f"{flag}=1": f"{flag}: " for flag in script.REFUSED},
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_with_a_subject_is_refused(words, capsys, tmp_path, monkeypatch):
    """Each mistake is refused in one sentence, before anything heavy loads, and nothing is made on the disk."""
    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(SystemExit) as end:
        parsed(*words.split())
    sentence = capsys.readouterr().err.split(": error: ")[1]
    assert end.value.code == 2 and MISTAKES[words] in sentence and sentence.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "here"]


def test_folders_beside_each_other_are_taken(tmp_path, monkeypatch):
    """A class folder beside the pictures' folder is none in it, however its path is written or its name begins."""
    (tmp_path / "dog").mkdir()
    monkeypatch.chdir(tmp_path)
    for folder in ("dogs", "dog/../dogs", "./dog-class"):
        words = ("--with_prior_preservation", "--class_prompt", "x", "--class_data_dir", folder)
        assert parsed("--instance_data_dir", "dog", *words).class_data_dir == folder


@pytest.mark.parametrize("flags", ["--train_text_encoder", ""])
def test_deepspeed_and_the_text_encoder(flags):
    """DeepSpeed can train one model only, which is said of the flag."""
    accelerator = SimpleNamespace(distributed_type=script.DistributedType.DEEPSPEED, device="cpu")
    begun = SimpleNamespace(accelerator=accelerator, args=parsed(*flags.split()))
    models = SimpleNamespace(trained=[None, None] if flags else [None], unet=None)
    with pytest.raises(SystemExit if flags else AttributeError, match="--train_text_encoder" if flags else "NoneType"):
        script.prepare_training(begun, models)
