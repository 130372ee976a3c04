"""generate.py: the same pictures on any number of processes, from whatever a script leaves, told by their files."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMPipeline,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from helpers import ROOT, WORD, files_in, finish, flags_of, run, start_ranks, state_of, write_config
from PIL import Image
from safetensors.torch import save_file
from single_file import save_single_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

import generate
import textual_inversion
import train_lora
import train_text_to_image
import train_unconditional


PROMPTS = ["a red circle", "a green square", "a red circle"]
FEW = ("--num_inference_steps", 2)


@pytest.fixture
def draw(tiny_model, tmp_path):
    """draw(name, *flags) draws with the tiny model, or with --model, into a folder, and returns it."""

    def into(name, *flags, model=tiny_model):
        run(generate, "--model", model, *FEW, "--height", 32, "--width", 32, "--output_dir", tmp_path / name, *flags)
        return tmp_path / name

    return into


def pixels(folder):
    """The pictures of a folder by their names, as numbers."""
    return {file.name: np.asarray(Image.open(file)).astype(int) for file in sorted(folder.glob("*.png"))}


def files_of(folder):
    """The pictures that are drawn in a folder, by their places in it."""
    return sorted(file.relative_to(folder) for file in folder.glob("*/*/*.png"))


def by_hand(pipeline, prompt, number=0, seed=0, **settings):
    """What generate.py should draw."""
    generator = torch.Generator().manual_seed(generate.noise_seed({"seed": seed, "prompt": prompt, "number": number}))
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "generator": generator, **settings}
    return np.asarray(pipeline(prompt, **settings).images[0]).astype(int)


# The pictures.


def test_pictures_by_hand(draw, tiny_model):
    """Each is the pipeline's own from its own noise; no two are alike, also of a prompt that is given twice."""
    drawn = pixels(draw("out", "--prompt", *PROMPTS, "--num_images_per_prompt", 2) / "pictures")
    assert list(drawn) == [f"0000{prompt}-{copy}.png" for prompt in range(3) for copy in range(2)]
    assert len({picture.tobytes() for picture in drawn.values()}) == 6
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    for name, prompt, number in (("00000-0", 0, 0), ("00001-1", 1, 1), ("00002-1", 2, 10**6 + 1)):
        assert (drawn[f"{name}.png"] == by_hand(pipeline, PROMPTS[prompt], number)).all()


@pytest.mark.launch
def test_processes_order_and_what_is_there_do_not_matter(draw, start, tiny_model, tmp_path):
    """One process, two and three, and a run that was interrupted, draw the same bytes."""
    flags = ("--prompt", *PROMPTS, "--num_images_per_prompt", 2, "--height", 32, "--width", 32)
    whole = draw("whole", *flags)
    wanted = files_in(whole / "pictures")
    for ranks in (2, 3):
        words = ("--model", tiny_model, *FEW, *flags, "--output_dir", tmp_path / f"of-{ranks}")
        finish(lambda *given, **how: start(*given, script="generate", **how), words, ranks)
        assert files_in(tmp_path / f"of-{ranks}" / "pictures") == wanted
    some = tmp_path / "some" / "pictures"
    some.mkdir(parents=True)
    for name in ("00000-1.png", "00002-0.png"):
        shutil.copy(whole / "pictures" / name, some)
    before = state_of(some)
    assert files_in(draw("some", *flags) / "pictures") == wanted
    assert before.items() <= state_of(some).items()


def test_batches_change_last_bits_alone(draw):
    """Above one picture at a time, batch-mates round differently."""
    flags = ("--prompt", *PROMPTS, "--num_images_per_prompt", 2)
    alone, together = (pixels(draw(f"by-{size}", *flags, "--batch_size", size) / "pictures") for size in (1, 4))
    assert alone.keys() == together.keys()
    assert max(abs(alone[name] - together[name]).max() for name in alone) <= 2


@pytest.mark.launch
def test_a_signal_ends_it_after_the_picture(start, draw, tiny_model, tmp_path):
    """What is there is whole, and the same command draws the rest."""
    flags = ("--prompt", "a red circle", "--num_images_per_prompt", 40, "--height", 32, "--width", 32)
    words = ("--model", tiny_model, *FEW, *flags, "--output_dir", tmp_path / "out")
    (process,) = start_ranks(lambda given: start(given, script="generate"), words, 1)
    process.until(lambda: len(list((tmp_path / "out").glob("pictures/*.png"))) > 1)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(20) == 143
    assert "Stopped by SIGTERM. The same command goes on from here." in process.output()
    drawn = state_of(tmp_path / "out" / "pictures")
    assert 1 < len(drawn) < 40 and not any(name.endswith(".tmp") for name in drawn)
    assert drawn.items() <= state_of(draw("out", *flags) / "pictures").items()
    assert len(list((tmp_path / "out").glob("pictures/*.png"))) == 40


def test_another_model_is_not_mixed_in(draw, tiny_v_model, tmp_path):
    """A folder holds pictures of one model, one scheduler and one set of flags."""
    draw("out", "--prompt", "a red circle")
    before = state_of(tmp_path / "out")
    for changed, flags in {
        "weights": (),
        "guidance_scale": ("--guidance_scale", 3),
        "prompt": ("--prompt", "a green square"),
        "scheduler": ("--scheduler", "EulerDiscreteScheduler"),
    }.items():
        model = {"model": tmp_path / "other"} if changed == "weights" else {}
        if model:
            pipeline = StableDiffusionPipeline.from_pretrained(tiny_v_model)
            pipeline.unet.conv_in.bias.data += 1
            pipeline.save_pretrained(model["model"])
        with pytest.raises(SystemExit, match=f"00000-0.png was drawn with {changed} .*, not .*: take another"):
            draw("out", "--prompt", "a red circle", *flags, **model)
    assert state_of(tmp_path / "out") == before


def test_compare_draws_from_the_same_noise(draw, tiny_model, tiny_v_model, tmp_path):
    """Two models side by side: the second's pictures stand in a folder of their own, and below in the sheet."""
    out = draw("out", "--prompt", *PROMPTS, "--compare", tiny_v_model)
    second = StableDiffusionPipeline.from_pretrained(tiny_v_model)
    assert (pixels(out / "compare")["00001-0.png"] == by_hand(second, PROMPTS[1])).all()
    sheet = Image.open(out / "grid.png")
    assert sheet.size == (3 * 256, 2 * 256)
    below = np.asarray(sheet.crop((256, 256, 512, 512)).resize((32, 32), Image.Resampling.BOX)).astype(int)
    assert abs(below - pixels(out / "compare")["00001-0.png"]).mean() < 8
    assert files_in(draw("same", "--prompt", *PROMPTS) / "pictures") == files_in(out / "pictures")


@pytest.mark.launch
def test_two_processes_say_once_what_is_wrong(draw, start, tiny_model, tmp_path):
    """Whether all find it, or one of them as it draws."""
    draw("out", "--prompt", "a", "b")
    flags = ("--model", tiny_model, *FEW, "--height", 32, "--width", 32, "--output_dir", tmp_path / "out")
    (tmp_path / "torn.png").write_bytes(b"torn")
    rows = [{"prompt": "x", "image": str(tmp_path / "torn.png")}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for more, said in (
        (("--prompt", "b"), "was drawn with prompt 'a', not 'b': take another --output_dir"),
        (("--prompts", tmp_path / "none.txt"), "none.txt cannot be read"),
        (("--prompts", tmp_path / "rows.jsonl"), "torn.png does not open as a picture"),
    ):
        runs = start_ranks(lambda *given, **how: start(*given, script="generate", **how), (*flags, *more), 2)
        assert [process.wait(60) for process in runs] == [1, 1]
        output = "".join(process.output() for process in runs)
        assert output.count(said) == 1 and "Traceback" not in output, output


def test_tiles(draw):
    """Pictures that are decoded in parts differ little, and are not mixed with others."""
    large = ("--prompt", "a red circle", "--height", 96, "--width", 96)
    whole, tiled = (
        pixels(draw(name, *large, *more) / "pictures") for name, more in (("a", ()), ("b", ("--vae_tiling",)))
    )
    assert 0 < abs(whole["00000-0.png"] - tiled["00000-0.png"]).mean() < 8
    with pytest.raises(SystemExit, match="was drawn with vae_tiling True, not False"):
        draw("b", *large)


def test_settings_are_in_the_picture(draw, tmp_path):
    """As A1111 writes them, and in metadata.jsonl, which the training scripts read as captions."""
    out = draw("out", "--prompt", "a red circle", "--negative_prompt", "blue", "--seed", 5, "--guidance_scale", 3)
    text = Image.open(out / "pictures" / "00000-0.png").info["parameters"]
    seed = generate.noise_seed({"seed": 5, "prompt": "a red circle", "number": 0})
    wanted = f"a red circle\nNegative prompt: blue\nSteps: 2, Sampler: DDIMScheduler, CFG scale: 3.0, Seed: {seed}, "
    assert text.startswith(f"{wanted}Size: 32x32, Model hash: ")
    (row,) = map(json.loads, (out / "pictures" / "metadata.jsonl").read_text().splitlines())
    assert row["text"] == "a red circle" and row["seed"] == 5 and row["negative_prompt"] == "blue"
    args = train_text_to_image.parse_args(flags_of("me/model", out / "pictures", tmp_path / "trained"))
    (record,) = train_text_to_image.read_records(args)
    assert record["captions"] == ["a red circle"]


def test_more_pictures_later(draw):
    """Of each prompt, also of one that is given twice: those that are there stay."""
    flags = ("--prompt", "a red circle", "a red circle")
    before = files_in(draw("out", *flags) / "pictures")
    after = files_in(draw("out", *flags, "--num_images_per_prompt", 2) / "pictures")
    del before["metadata.jsonl"]
    assert before.items() <= after.items() and len({data for data in after.values()}) == 5


def test_a_text_that_was_changed_stays(draw):
    """In metadata.jsonl, until its picture is drawn anew in another way; a row that is none of a picture's goes."""
    folder = draw("out", "--prompt", "a", "b") / "pictures"
    file = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[0]["model"] == "tiny" and len(rows[0]["weights"]) == 16 and rows[0]["guidance_scale"] == 7.5
    rows[0] = {"file_name": "00000-0.png", "text": "changed", "note": "mine"}
    rows[1]["text"] = "changed"
    rows += [{"file_name": "gone.png"}, {"text": "x"}, {"file_name": ["00000-0.png"]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "00001-0.png").unlink()
    draw("out", "--prompt", "a", "c")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["text"] for row in rows] == ["changed", "c"]
    assert rows[0]["note"] == "mine" and rows[0]["prompt"] == "a" and rows[1]["prompt"] == "c"


def test_pictures_of_an_interrupted_run_have_rows(draw):
    """Also if the run after it asks for fewer."""
    folder = draw("out", "--prompt", "a", "b") / "pictures"
    wanted = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").unlink()
    draw("out", "--prompt", "a")
    assert (folder / "metadata.jsonl").read_text() == wanted


# The models.


@pytest.fixture(scope="module")
def results(tiny_model, pictures, tmp_path_factory):
    """Runs of the scripts: of adapters twice, a word, a whole model with an average, and one of pixels."""
    folder = tmp_path_factory.mktemp("results")
    short = ("--max_train_steps", 1, "--checkpointing_steps", 1, "--learning_rate", 1e-1)
    for seed, name in enumerate(("lora", "lora-2")):
        run(train_lora, *flags_of(tiny_model, pictures, folder / name, *short, "--seed", seed))
    word = ("--placeholder_token", WORD, "--initializer_token", "red")
    run(textual_inversion, *flags_of(tiny_model, pictures, folder / "word", *short, *word))
    v = ("--prediction_type", "v_prediction", "--use_ema")
    run(train_text_to_image, *flags_of(tiny_model, pictures, folder / "whole", *short, *v))
    config = write_config(folder / "config")
    words = ("--model_config_name_or_path", config, "--train_data_dir", pictures, "--output_dir", folder / "pixels")
    words += ("--resolution", 16, "--train_batch_size", 2, "--eval_batch_size", 0, "--report_to", "none")
    run(train_unconditional, *words, *short, "--prediction_type", "v_prediction", "--use_ema")
    return folder


def test_adapters(draw, results, tiny_model, tmp_path):
    """On the base of their run, at a scale, and several at once."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    plain = by_hand(pipeline, "a red circle")
    pipeline.load_lora_weights(results / "lora", adapter_name="one")
    drawn = pixels(draw("one", "--prompt", "a red circle", model=results / "lora") / "pictures")["00000-0.png"]
    assert (drawn == by_hand(pipeline, "a red circle")).all() and (drawn != plain).any()
    pipeline.set_adapters("one", 0.5)
    half = draw("half", "--prompt", "a red circle", "--lora_scale", 0.5, model=results / "lora" / "checkpoint-1")
    assert (pixels(half / "pictures")["00000-0.png"] == by_hand(pipeline, "a red circle")).all()
    with pytest.raises(SystemExit, match=r"was drawn with lora_scale \[0.5\], not \[1.0\]"):
        draw("half", "--prompt", "a red circle", model=results / "lora" / "checkpoint-1")
    with pytest.raises(SystemExit, match="--lora_scale has 2 numbers, and there are 1 adapters"):
        draw("none", "--prompt", "a red circle", "--lora_scale", 1, 2, model=results / "lora")
    pipeline.load_lora_weights(results / "lora-2", adapter_name="two")
    pipeline.set_adapters(["one", "two"], [0.5, 0.7])
    flags = ("--prompt", "a red circle", "--lora_scale", 0.5, 0.7)
    both = tmp_path / "both"
    models = ("--model", results / "lora", results / "lora-2")
    run(generate, *models, *FEW, *flags, "--height", 32, "--width", 32, "--output_dir", both)
    assert (pixels(both / "pictures")["00000-0.png"] == by_hand(pipeline, "a red circle")).all()


def test_the_order_of_parts_does_not_matter(draw, results, tiny_model, tmp_path):
    """A UNet goes before adapters, which it would take with it, in whatever order they are named."""
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    unet.conv_in.bias.data += 1
    unet.save_pretrained(tmp_path / "unet")
    drawn = []
    for order in ((results / "lora", tmp_path / "unet"), (tmp_path / "unet", results / "lora")):
        out = tmp_path / f"first-{order[0].name}"
        flags = ("--base", tiny_model, "--prompt", "a red circle", *FEW, "--height", 32, "--width", 32)
        run(generate, "--model", *order, *flags, "--output_dir", out)
        drawn.append(pixels(out / "pictures")["00000-0.png"])
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, unet=unet)
    alone = by_hand(pipeline, "a red circle")
    pipeline.load_lora_weights(results / "lora")
    assert (drawn[0] == drawn[1]).all() and (drawn[0] == by_hand(pipeline, "a red circle")).all()
    assert (drawn[0] != alone).any()


def test_both_models_draw_in_one_size(results, tiny_model, tmp_path):
    """That of the run, whichever is first, or else the first one's own: noise of two shapes would not be the same."""
    smaller = shutil.copytree(tiny_model, tmp_path / "smaller")
    config = json.loads((smaller / "unet" / "config.json").read_text())
    (smaller / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": config["sample_size"] // 3}))
    for first, second, side in (
        (tiny_model, results / "lora", 32),
        (results / "lora", tiny_model, 32),
        (tiny_model, smaller, 48),
        (smaller, tiny_model, 16),
    ):
        out = tmp_path / f"{first.name}-{second.name}"
        run(generate, "--model", first, "--compare", second, "--prompt", "x", *FEW, "--output_dir", out)
        drawn = [pixels(out / name)["00000-0.png"] for name in ("pictures", "compare")]
        assert {picture.shape for picture in drawn} == {(side, side, 3)}, (first, second)


def test_a_word(draw, results, tiny_model):
    """It is known in prompts."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipeline.load_textual_inversion(results / "word")
    drawn = draw("out", "--prompt", f"a {WORD}", model=results / "word")
    assert (pixels(drawn / "pictures")["00000-0.png"] == by_hand(pipeline, f"a {WORD}")).all()


def test_a_word_of_one_file(draw, results, tiny_model, tiny_sdxl_model, tmp_path):
    """It goes to the text encoder that it fits; what is for other programs is refused."""
    (wanted,) = pixels(draw("folder", "--prompt", f"a {WORD}", model=results / "word") / "pictures").values()
    file = results / "word" / "learned_embeds.safetensors"
    assert (pixels(draw("file", "--prompt", f"a {WORD}", model=file) / "pictures")["00000-0.png"] == wanted).all()
    pipeline = DiffusionPipeline.from_pretrained(tiny_sdxl_model)
    width = pipeline.text_encoder_2.config.hidden_size
    save_file({WORD: torch.ones(2, width)}, tmp_path / "second.safetensors")
    generate.add_word(pipeline, str(tmp_path / "second.safetensors"))
    if width != pipeline.text_encoder.config.hidden_size:
        assert WORD in pipeline.tokenizer_2.get_vocab() and WORD not in pipeline.tokenizer.get_vocab()
    save_file({"clip_l": torch.ones(2, 8), "clip_g": torch.ones(2, width)}, tmp_path / "both.safetensors")
    with pytest.raises(ValueError, match="is for other programs: give its folder"):
        generate.add_word(pipeline, str(tmp_path / "both.safetensors"))
    save_file({WORD: torch.ones(2, 7)}, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="fit no text encoder"):
        generate.add_word(pipeline, str(tmp_path / "none.safetensors"))


def test_a_controlnet(draw, tiny_model, tmp_path):
    """It goes on its base, and draws from --image, or from each row's own, also of unlike sizes."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    controlnet = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(16, 32))
    for layer in controlnet.controlnet_down_blocks:
        torch.nn.init.ones_(layer.weight)
    controlnet.save_pretrained(tmp_path / "net")
    for side, name in ((32, "small"), (48, "large")):
        Image.effect_noise((side, side), 80).convert("RGB").save(tmp_path / f"{name}.png")
    rows = [{"prompt": "a red circle", "image": str(tmp_path / f"{name}.png")} for name in ("small", "large")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--base", tiny_model, "--prompts", tmp_path / "p.jsonl", "--batch_size", 2)
    drawn = pixels(draw("out", *flags, model=tmp_path / "net") / "pictures")
    whole = StableDiffusionControlNetPipeline(**pipeline.components, controlnet=controlnet)
    for number, (name, row) in enumerate(zip(drawn, rows)):
        wanted = by_hand(whole, "a red circle", 10**6 * number, image=Image.open(row["image"]))
        assert (drawn[name] == wanted).all() and (wanted != by_hand(pipeline, "a red circle", 10**6 * number)).any()


def test_a_model_of_edits(draw, tiny_model, tmp_path):
    """A pipeline with 8 channels takes a picture and keeps its size, also of pictures of unlike sizes in a batch."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "in_channels": 8})
    parts = {**pipeline.components, "image_encoder": None}
    whole = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    whole.save_pretrained(tmp_path / "edits")
    sizes = ((48, 32), (32, 48), (48, 32))
    for i, size in enumerate(sizes):
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / f"{i}.png")
    rows = [{"prompt": "make it red", "image": str(tmp_path / f"{i}.png")} for i in range(3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--model", tmp_path / "edits", "--prompts", tmp_path / "p.jsonl", "--batch_size", 3, *FEW)
    run(generate, *flags, "--output_dir", tmp_path / "out")
    drawn = pixels(tmp_path / "out" / "pictures").values()
    whole.set_progress_bar_config(disable=True)
    for number, (picture, size, row) in enumerate(zip(drawn, sizes, rows, strict=True)):
        seed = generate.noise_seed({"seed": 0, "prompt": "make it red", "number": 10**6 * number})
        given = {"image": Image.open(row["image"]), "generator": torch.Generator().manual_seed(seed)}
        wanted = np.asarray(whole("make it red", num_inference_steps=2, **given).images[0]).astype(int)
        assert picture.shape == (*size[::-1], 3) and abs(picture - wanted).max() <= 2


def test_a_checkpoint(draw, results, tiny_model):
    """Its UNet, or the average, goes on the base, and samples as it was trained."""
    pipeline = DiffusionPipeline.from_pretrained(results / "whole")
    for name, part in (("checkpoint-1", "unet"), ("checkpoint-1/unet_ema", "unet_ema")):
        pipeline.unet = UNet2DConditionModel.from_pretrained(results / "whole" / "checkpoint-1" / part)
        drawn = draw(part, "--prompt", "a red circle", model=results / "whole" / name)
        assert (pixels(drawn / "pictures")["00000-0.png"] == by_hand(pipeline, "a red circle")).all()
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_a_card_tells_the_schedule(draw, results, tiny_model, pictures, tmp_path):
    """Adapters draw by their card as they do by their train_args.yaml, which no upload has."""
    schedule = ("--prediction_type", "v_prediction", "--rescale_betas_zero_snr", "--max_train_steps", 1)
    run(train_lora, *flags_of(tiny_model, pictures, tmp_path / "lora", *schedule))
    flags = ("--prompt", "a red circle", "--base", tiny_model)
    wanted = files_in(draw("by-flags", *flags, model=tmp_path / "lora") / "pictures")
    (tmp_path / "lora" / "train_args.yaml").unlink()
    assert files_in(draw("by-card", *flags, model=tmp_path / "lora") / "pictures") == wanted
    told = generate.run_flags(tmp_path / "lora")
    assert told["prediction_type"] == "v_prediction" and told["rescale_betas_zero_snr"] is True
    card = (tmp_path / "lora" / "README.md").read_text()
    (tmp_path / "lora" / "README.md").write_text(card.split("<!--")[0])  # as somebody else's
    assert generate.run_flags(tmp_path / "lora") == {"pretrained_model_name_or_path": None}


@pytest.mark.launch
def test_models_of_the_hub(draw, results, tiny_model, hub, tmp_path):
    """Whatever a folder may hold a repository may hold, with what it goes on in its card; also without a network."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    net = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(16, 32))
    net.save_pretrained(tmp_path / "me" / "net")
    for name, file in (("lora", "pytorch_lora_weights.safetensors"), ("word", "learned_embeds.safetensors")):
        (tmp_path / "me" / name).mkdir()
        shutil.copy(results / name / file, tmp_path / "me" / name)
    hub.add_folder("me/base", tiny_model)
    for name in ("lora", "word", "net"):
        (tmp_path / "me" / name / "README.md").write_text("---\nbase_model: me/base\n---\n")
        hub.add_folder(f"me/{name}", tmp_path / "me" / name)
    Image.effect_noise((32, 32), 80).save(tmp_path / "a.png")
    shape = ("--prompt", f"a red {WORD}", *FEW, "--height", 32, "--width", 32, "--output_dir")
    control = ("--image", tmp_path / "a.png")
    here = tmp_path / "here"
    models = ("--model", results / "lora", results / "word", "--compare", tiny_model)
    run(generate, *models, *shape, here / "parts")
    run(generate, "--model", tmp_path / "me" / "net", "--base", tiny_model, *control, *shape, here / "net")
    wanted = {path: pixels((here / path).parent)[path.name] for path in files_of(here)}
    assert len(wanted) == 3
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # as in this process
    parts = ("--model", "me/lora", "me/word", "--compare", "me/base")
    for offline, name, flags in (
        ("0", "parts", parts),
        ("1", "parts", parts),
        ("0", "net", ("--model", "me/net", *control)),
    ):
        environment = {**hub.env, **threads, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": offline}
        there = tmp_path / f"offline-{offline}"
        command = [str(word) for word in (sys.executable, ROOT / "generate.py", *flags, *shape, there / name)]
        done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        for path in files_of(there):
            assert (pixels((there / path).parent)[path.name] == wanted[path]).all(), path
    assert len(files_of(tmp_path / "offline-0")) == 3 and len(files_of(tmp_path / "offline-1")) == 2


def test_a_single_file(draw, tiny_model, tmp_path):
    """As other programs take it."""
    file = save_single_file(tiny_model, tmp_path / "model.safetensors")
    drawn = draw("out", "--prompt", "a red circle", "--base", tiny_model, model=file)
    wanted = by_hand(StableDiffusionPipeline.from_pretrained(tiny_model), "a red circle")
    assert abs(pixels(drawn / "pictures")["00000-0.png"] - wanted).max() <= 1


def test_a_family_that_the_scripts_do_not_train(tiny_model, tmp_path):
    """Stable Diffusion 3, say, which has no UNet: at the size that it was made for."""
    torch.manual_seed(0)
    clip = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    tokenizer = CLIPTokenizer.from_pretrained(tiny_model / "tokenizer")
    clip |= {"vocab_size": len(tokenizer), "projection_dim": 32}
    transformer = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4, "patch_size": 1}
    transformer |= {"sample_size": 32, "in_channels": 4, "out_channels": 4, "caption_projection_dim": 32}
    pieces = [(piece, -1.0) for piece in ("<pad>", "</s>", "<unk>", *"▁abcdefghijklmnopqrstuvwxyz")]
    encoder = T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4))
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**transformer, joint_attention_dim=32, pooled_projection_dim=64),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=1, shift_factor=0.1),
        text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**clip)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**clip)),
        text_encoder_3=encoder,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=T5TokenizerFast(vocab=pieces),
    )
    pipeline.save_pretrained(tmp_path / "sd3")
    run(generate, "--model", tmp_path / "sd3", "--prompt", "a red circle", *FEW, "--output_dir", tmp_path / "out")
    (drawn,) = pixels(tmp_path / "out" / "pictures").values()
    assert drawn.shape == (32, 32, 3)
    assert (drawn == by_hand(DiffusionPipeline.from_pretrained(tmp_path / "sd3"), "a red circle")).all()


def test_a_model_of_pixels(results, tmp_path):
    """It takes no prompt; a checkpoint of a new one has the noise schedule of its flags."""
    for name, model in (("whole", "pixels"), ("averaged", "pixels/checkpoint-1/unet_ema")):
        flags = ("--num_images_per_prompt", 2, "--batch_size", 2, *FEW)
        run(generate, "--model", results / model, *flags, "--output_dir", tmp_path / name)
    flags = ("--model", results / "pixels", *FEW, "--output_dir", tmp_path / "ddim")
    run(generate, *flags, "--scheduler", "DDIMScheduler")
    for more, said in (
        (("--scheduler", "PNDMScheduler"), "PNDMScheduler is none of DDIMScheduler, DDPMScheduler"),
        (("--vae_tiling",), "has no VAE for --vae_tiling"),
    ):
        with pytest.raises(SystemExit, match=said):
            run(generate, *flags, *more)
    drawn, averaged = (pixels(tmp_path / name / "pictures") for name in ("whole", "averaged"))
    assert {picture.shape for picture in drawn.values()} == {(16, 16, 3)} and len(drawn) == 2
    pipeline = DDPMPipeline.from_pretrained(results / "pixels")
    seeds = [generate.noise_seed({"seed": 0, "prompt": "", "number": number}) for number in range(2)]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(batch_size=2, generator=generators, num_inference_steps=2).images
    assert all((np.asarray(image).astype(int) == drawn[f"00000-{i}.png"]).all() for i, image in enumerate(wanted))
    assert all((averaged[name] == drawn[name]).all() for name in drawn)  # the result is the average


# The prompts.


def test_files_of_prompts(draw, tiny_model, tmp_path, capsys):
    """Lines, or rows with settings of their own."""
    rows = [{"prompt": "a red circle", "seed": 3}, {"prompt": "a green square", "guidance_scale": 3.5, "note": "x"}]
    (tmp_path / "p.txt").write_text("a red circle\n\n a green square \n")
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with open(tmp_path / "p.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "seed", "guidance_scale"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows([{**row, "text": row["prompt"]} for row in rows])
    columns = dict.fromkeys(("prompt", "seed", "guidance_scale", "note"))
    Dataset.from_list([columns | row for row in rows]).to_parquet(tmp_path / "p.parquet")
    plain = files_in(draw("given", "--prompt", "a red circle", "a green square") / "pictures")
    assert files_in(draw("txt", "--prompts", tmp_path / "p.txt") / "pictures") == plain
    kinds = ("jsonl", "csv", "parquet")
    drawn = [pixels(draw(kind, "--prompts", tmp_path / f"p.{kind}") / "pictures") for kind in kinds]
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    wanted = by_hand(pipeline, "a red circle", seed=3), by_hand(pipeline, "a green square", guidance_scale=3.5)
    for found in drawn:
        assert (found["00000-0.png"] == wanted[0]).all() and (found["00001-0.png"] == wanted[1]).all()
    assert "p.jsonl: note is not read, but text, prompt, " in capsys.readouterr().out


def test_numbers_of_tables(tmp_path):
    """Whole numbers may stand there as 5.0, as they do beside empty cells."""
    (tmp_path / "p.csv").write_text("prompt,seed,guidance_scale\nversion 2.0,5.0,3.0\nb,,2.5\n")
    rows = [{"prompt": "version 2.0", "seed": 5, "guidance_scale": 3.0}, {"prompt": "b", "guidance_scale": 2.5}]
    assert generate.read_prompts(tmp_path / "p.csv") == rows
    (tmp_path / "p.jsonl").write_text('{"text": "b", "seed": 5.0}\n')
    assert generate.read_prompts(tmp_path / "p.jsonl") == [{"prompt": "b", "text": "b", "seed": 5}]


@pytest.mark.parametrize(
    "row, said",
    [
        ('{"prompt": "x", "seed": 5.7}', "seed of row 2 must be a number of type int .* not 5.7"),
        ('{"prompt": "x", "height": true}', "height of row 2 must be a number of type int .* not True"),
        ('{"prompt": "x", "guidance_scale": Infinity}', "guidance_scale of row 2 must be a number"),
        ('{"prompt": "x", "seed": Infinity}', "seed of row 2 must be a number"),
        ('{"prompt": "x", "image": 3}', "image of row 2 expected string"),
        ('{"prompt": "x\\ud800"}', "prompt of row 2 must be text in UTF-8"),
        ('["x"]', "p.jsonl cannot be read: row 2 is no object, {...}"),
        ('{"prompt": ""}', "row 2 has no column prompt or text, or nothing in it"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row, said):
    """With its column."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + row + "\n")
    with pytest.raises(SystemExit, match=said):
        generate.read_prompts(tmp_path / "p.jsonl")


def test_a_typed_prompt_wins_over_a_file_of_flags(tmp_path, monkeypatch):
    """As the two say the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flags.yaml").write_text("model: [a]\nprompts: gone.txt\n")
    (job,) = generate.make_jobs(generate.parse_args(["--config", "flags.yaml", "--prompt", "a cat"]))
    assert job["prompt"] == "a cat"


def test_a_shorter_run_keeps_the_rows_of_a_longer_one(draw):
    """Each picture that is there keeps its prompt."""
    draw("out", "--prompt", "a", "b", "--num_images_per_prompt", 2)
    out = draw("out", "--prompt", "a")
    rows = [json.loads(line) for line in (out / "pictures" / "metadata.jsonl").read_text().splitlines()]
    assert [(row["file_name"], row["text"]) for row in rows] == [
        (f"0000{i}-{copy}.png", text) for i, text in enumerate("ab") for copy in range(2)
    ]


def test_prompts_of_odd_lines(tmp_path):
    """What only some readers take for the end of a line is part of a prompt, as is a line break in quotes."""
    odd = "a red\u2028circle\x85"
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": odd}, ensure_ascii=False) + "\r\n")
    (tmp_path / "p.csv").write_text('prompt,seed\n"a red\n\ncircle",5\n')
    assert generate.read_prompts(tmp_path / "p.jsonl") == [{"prompt": odd}]
    assert generate.read_prompts(tmp_path / "p.csv") == [{"prompt": "a red\n\ncircle", "seed": 5}]


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--seed 1", "draws from prompts: give --prompt or --prompts"),
        ("--prompts none.txt", "none.txt cannot be read: .*No such file"),
        ("--prompts empty.txt", "empty.txt holds no prompt"),
        ("--prompts a.odt", "a.odt is none of .txt, .jsonl, .csv and .parquet"),
        ("--prompts a.jsonl", "a.jsonl: row 1 has no column prompt or text"),
        ("--prompts list.jsonl", "list.jsonl: prompt of row 1 expected string"),
        ("--prompts torn.jsonl", "torn.jsonl cannot be read: line 1: Expecting value "),
        ("--prompts wide.csv", "wide.csv cannot be read: row 2 has more cells than the header: quote texts"),
        ("--prompts seed.jsonl", "seed.jsonl: seed of row 1 must be a number of type int from 0"),
        ("--prompt x --image none.png", "There is no picture none.png"),
        ("--prompt x --scheduler Nothing", "--scheduler Nothing is none of .*DDIMScheduler, .*EulerDiscreteScheduler"),
        ("--prompt x --image there.png", "A StableDiffusionPipeline takes no image"),
        (
            "--prompt x --num_inference_steps 0",
            "--num_inference_steps: must be a number of type int from 1 to .*, not 0",
        ),
        ("--prompt x --scheduler UNet2DModel", "--scheduler UNet2DModel is none of .*DDIMScheduler"),
        ("--prompt x --scheduler EDMEulerScheduler", "--scheduler EDMEulerScheduler is none of"),
        ("--prompt x --lora_scale nan", "--lora_scale: must be a number"),
        ("--prompt x --output_dir foreign", "foreign/pictures/00000-0.png is none of this program's pictures"),
        ("--prompt x --output_dir torn", "torn/pictures/00000-0.png is none of this program's pictures"),
        ("--prompt x --height 33", "--height: must be a multiple of 8, not 33"),
        ("--prompts odd.jsonl", "odd.jsonl: width of row 1 must be a multiple of 8, not 12"),
        (
            "--prompt x --scheduler FlowMatchEulerDiscreteScheduler",
            "--scheduler FlowMatchEulerDiscreteScheduler is none of",
        ),
        ("--prompt x --num_processes 2", "unrecognized argument --num_processes"),
    ],
)
def test_refused(draw, tmp_path, monkeypatch, capsys, flags, said):
    """A sentence that names the flag or the file."""
    monkeypatch.chdir(tmp_path)
    texts = {
        "empty.txt": "\n",
        "a.odt": "x",
        "list.jsonl": '{"prompt": [1]}',
        "a.jsonl": '{"caption": "x"}',
        "torn.jsonl": "x",
        "wide.csv": "prompt,seed\na,1\na cat, sitting,2\n",
    }
    texts["odd.jsonl"] = '{"prompt": "x", "width": 12}'
    for name, text in {**texts, "seed.jsonl": '{"prompt": "x", "seed": "x"}'}.items():
        (tmp_path / name).write_text(text)
    Image.new("RGB", (8, 8)).save(tmp_path / "there.png")
    for name in ("foreign", "torn"):
        (tmp_path / name / "pictures").mkdir(parents=True)
        shutil.copy(tmp_path / "there.png", tmp_path / name / "pictures" / "00000-0.png")
    (tmp_path / "torn" / "pictures" / "00000-0.png").write_bytes(b"torn")
    with pytest.raises(SystemExit) as end:
        draw("out", *flags.split())
    assert re.search(said, f"{end.value} {capsys.readouterr().err}")


@pytest.mark.parametrize(
    "model, said",
    [
        ("nothing", "holds none of"),
        ("me/typo", "there is no such folder or file, and as a Hub id: "),
        ("headless", "Error no file named diffusion_pytorch_model"),
        ("lora", "nothing says what it goes on"),
        ("gone", "there is no such folder or file"),
        ("nothing/README.md", "a model of one file is a .safetensors"),
    ],
)
def test_models_that_are_none(draw, results, tiny_model, tmp_path, model, said):
    """A folder without a model or without weights, what is nowhere, and adapters that are alone."""
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "README.md").write_text("x")
    (tmp_path / "lora").mkdir()
    shutil.copytree(tiny_model, tmp_path / "headless")
    for file in (tmp_path / "headless" / "unet").glob("*.safetensors"):
        file.unlink()
    shutil.copy(results / "lora" / "pytorch_lora_weights.safetensors", tmp_path / "lora")
    with pytest.raises(SystemExit, match=said):
        draw("out", "--prompt", "x", model=model if model == "me/typo" else tmp_path / model)


@pytest.mark.parametrize("part, name", [("pixels/unet", "UNet2DModel"), ("vae", "AutoencoderKL"), ("clip", "None")])
def test_a_part_of_another_kind_is_refused(results, tiny_model, tmp_path, part, name):
    """By the names of the classes."""
    folder = {"pixels/unet": results / part, "vae": tiny_model / "vae", "clip": ROOT / "demo" / "clip"}[part]
    with pytest.raises(SystemExit, match=f"is a {name}, and no UNet2DConditionModel"):
        models = ("--model", results / "lora", folder)
        run(generate, *models, "--base", tiny_model, "--prompt", "x", "--output_dir", tmp_path / "out")


def test_a_file_without_its_configs(draw, tiny_model, tmp_path):
    """Without a network, a single file needs a folder of its kind, and the sentence says so."""
    file = save_single_file(tiny_model, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit, match="--base has to name a folder of its kind"):
        draw("out", "--prompt", "x", model=file)


def test_what_is_drawn_from_a_picture(draw, tiny_model, tmp_path, capsys):
    """It has the picture's shape and the run's resolution; without a picture, the model is refused."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    net = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(16, 32))
    net.save_pretrained(tmp_path / "net")
    settings = {"pretrained_model_name_or_path": str(tiny_model), "resolution": 32}
    (tmp_path / "net" / "train_args.yaml").write_text(json.dumps(settings))
    Image.effect_noise((96, 64), 80).save(tmp_path / "wide.png")
    flags = ("--model", tmp_path / "net", "--prompt", "x", *FEW)
    run(generate, *flags, "--image", tmp_path / "wide.png", "--output_dir", tmp_path / "out")
    (drawn,) = pixels(tmp_path / "out" / "pictures").values()
    assert drawn.shape == (32, 48, 3)
    with pytest.raises(SystemExit, match="draws from pictures: give --image"):
        run(generate, *flags, "--output_dir", tmp_path / "none")


def test_guidance_by_the_picture(draw, tiny_model, tmp_path):
    """--image_guidance_scale reaches an editor, and no other pipeline takes it."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "in_channels": 8})
    whole = StableDiffusionInstructPix2PixPipeline(
        **{**pipeline.components, "image_encoder": None}, requires_safety_checker=False
    )
    whole.save_pretrained(tmp_path / "edits")
    Image.effect_noise((32, 32), 80).save(tmp_path / "a.png")
    drawn = []
    for scale in (1, 3):
        flags = ("--model", tmp_path / "edits", "--image", tmp_path / "a.png", "--prompt", "x", *FEW)
        run(generate, *flags, "--image_guidance_scale", scale, "--output_dir", tmp_path / f"by-{scale}")
        drawn += pixels(tmp_path / f"by-{scale}" / "pictures").values()
    assert (drawn[0] != drawn[1]).any()
    with pytest.raises(SystemExit, match="A StableDiffusionPipeline takes no image_guidance_scale"):
        draw("out", "--prompt", "x", "--image_guidance_scale", 2)
