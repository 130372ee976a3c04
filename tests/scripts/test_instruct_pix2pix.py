"""train_instruct_pix2pix.py: 8 channels, dropout by one draw, the loss by hand, resuming, a pipeline that edits."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from helpers import changed, everything, flags_of, make_run, metrics, run, same, save_pairs, scale_weight, weights
from PIL import Image

import generate
import train_instruct_pix2pix as script


FAMILIES = ["tiny_model", "tiny_sd2_model", "tiny_sdxl_model"]
NO_CACHE = ("tiny_model", "--no_encoding_cache")
FLAGS = ("--max_train_steps", 3, "--learning_rate", 1e-2, "--resolution", 32, "--edit_prompt_column", "edit_prompt")


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    """A folder of four edits, named as the library datasets has it."""
    folder = tmp_path_factory.mktemp("edits") / "data"
    return save_pairs(folder, "edited_image_file_name", "input_image", "edit_prompt", wider=0)


@pytest.fixture
def train(tiny_model, edits, tmp_path, monkeypatch):
    """Trains an editor on a tiny base."""
    monkeypatch.setattr(script, "SAMPLER_STEPS", 2)

    def into(name, *flags, base=tiny_model):
        run(script, *flags_of(base, edits, tmp_path / name, *FLAGS, *flags))
        return tmp_path / name

    return into


def made(base, data, *flags):
    """A run's models and samples, before training."""
    words = flags_of(base, data, "out", *FLAGS, "--no_encoding_cache", *flags)
    args = script.parse_args([str(word) for word in words])
    begun = make_run(script, args)
    models = script.load_models(begun)
    records = script.check_records(begun, script.read_records(args))
    samples = script.Samples(args, records, 0, 32, models.sample_shape, 1000)
    samples.tokenizers = models.tokenizers
    return args, models, samples


def test_pairs(edits):
    """The edited picture is trained on, the other goes with it, and neither is taken for the other."""
    words = ["--pretrained_model_name_or_path", "a/b", "--train_data_dir", str(edits), "--output_dir", "out"]
    records = script.read_records(script.parse_args(words))
    assert [record["name"] for record in records] == [str(edits / "pictures" / f"{i}.png") for i in range(4)]
    assert [record["others"]["original"]["name"] for record in records] == [
        str(edits / "others" / f"{i}.png") for i in range(4)
    ]
    assert records[2]["captions"] == ["number 2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_widening_changes_nothing(base, family, edits):
    """Old weights and bias are kept, and the new channels' are zero, so that any original gives the base's output."""
    _, models, _ = made(base, edits)
    old, new = UNet2DConditionModel.from_pretrained(base, subfolder="unet"), models.unet
    assert new.config.in_channels == 8 and torch.equal(new.conv_in.weight[:, :4], old.conv_in.weight)
    assert not new.conv_in.weight[:, 4:].any() and torch.equal(new.conv_in.bias, old.conv_in.bias)
    x, extra = torch.randn(2, 1, 4, 16, 16)
    hidden = torch.randn(1, 5, old.config.cross_attention_dim)
    added = {"text_embeds": torch.randn(1, 32), "time_ids": torch.ones(1, 6)} if "xl" in family else None
    with torch.no_grad():
        wanted = old(x, 5, hidden, added_cond_kwargs=added).sample
        found = new(torch.cat([x, extra], 1), 5, hidden, added_cond_kwargs=added).sample
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "change, said",
    [
        ("bare", None),
        ("beside file_name", None),
        ("no instruction", "has no column 'edit_prompt', but .*by the flag that ends in _column"),
        (
            "no original",
            "has no column 'input_image_file_name' or 'input_image', but .*by the flag that ends in _column",
        ),
    ],
)
def test_columns(edits, tmp_path, change, said):
    """A column may have the bare name; one of the edited picture counts before file_name; hints name a way out."""
    folder = shutil.copytree(edits, tmp_path / "data")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        if change == "bare":
            row["edited_image"], row["input_image"] = (
                row.pop("edited_image_file_name"),
                row.pop("input_image_file_name"),
            )
        if change == "beside file_name":
            row["file_name"] = row["input_image_file_name"]
        row.pop({"no instruction": "edit_prompt", "no original": "input_image_file_name"}.get(change), None)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--pretrained_model_name_or_path", "a/b", "--train_data_dir", str(folder), "--output_dir", "out"]
    if said:
        with pytest.raises(SystemExit, match=said):
            script.read_records(script.parse_args(words))
    else:
        records = script.read_records(script.parse_args(words))
        assert [record["name"] for record in records] == [str(folder / "pictures" / f"{i}.png") for i in range(4)]
        assert not any(record["problem"] for record in records)


def test_dropout_by_count(tiny_model, edits):
    """Of one draw: a share without instruction, as many without both, as many without the picture."""
    _, _, samples = made(tiny_model, edits, "--conditioning_dropout_prob", 0.2)
    draws = [script.draw_dropout(samples, (epoch, index)) for epoch in range(1000) for index in range(4)]
    for wanted, share in (((True, False), 0.2), ((True, True), 0.2), ((False, True), 0.2), ((False, False), 0.4)):
        assert draws.count(wanted) / len(draws) == pytest.approx(share, abs=0.025)
    for epoch in range(30):
        sample = samples[epoch, 0]
        without_instruction, without_original = script.draw_dropout(samples, (epoch, 0))
        assert sample["caption"] == ("" if without_instruction else "number 0")
        assert sample["keep_original"] == (not without_original)
    _, _, samples = made(tiny_model, edits)
    assert {script.draw_dropout(samples, (epoch, 0)) for epoch in range(100)} == {(False, False)}


def test_loss_by_hand(tiny_model, edits):
    """Noisy edited latents beside the original's mode, unscaled, or zeros where it was dropped."""
    args, models, samples = made(tiny_model, edits, "--conditioning_dropout_prob", 0.2)
    models.unet.conv_in.weight.data.normal_(std=0.1)
    keys = [(epoch, index) for epoch in range(4) for index in range(4)]
    batch = torch.utils.data.default_collate([samples[key] for key in keys])
    assert {*batch["keep_original"].tolist()} == {0, 1}
    with torch.no_grad():
        found = script.compute_loss(models, batch, args)["loss"].item()
        posterior = models.vae.encode(batch["pixel_values"]).latent_dist
        latents = (posterior.mean + posterior.std * batch["posterior_noise"]) * models.vae.config.scaling_factor
        original = models.vae.encode(batch["original_pixel_values"]).latent_dist.mode()
        original[batch["keep_original"] == 0] = 0
        alpha = models.noise_scheduler.alphas_cumprod[batch["timesteps"]][:, None, None, None]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * batch["noise"]
        hidden = models.text_encoders[0](batch["input_ids"][:, 0])[0]
        pred = models.unet(torch.cat([noisy, original], 1), batch["timesteps"], hidden).sample
    assert found == pytest.approx((pred - batch["noise"]).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("family, cache", [*((family, "--no-no_encoding_cache") for family in FAMILIES), NO_CACHE])
def test_resuming_is_exact(base, family, cache, train):
    """After a stop at each step, with everything random, from the cache or not."""
    flags = ("--max_train_steps", 4, "--checkpointing_steps", 1, "--use_ema", "--random_flip", "--no-center_crop")
    flags += ("--conditioning_dropout_prob", 0.2, "--validation_samples", 1, cache)
    whole = train("whole", *flags, base=base)
    for step in (1, 2, 3):
        train(f"from-{step}", *flags, "--max_train_steps", step, base=base)
        out = train(f"from-{step}", *flags, "--resume_from_checkpoint", "latest", base=base)
        assert same(weights(out), weights(whole))
        assert metrics(out, "loss")[step:] == metrics(whole, "loss")[step:]
        assert same(everything(out / "checkpoint-4"), everything(whole / "checkpoint-4"))


def test_the_cache_changes_nothing(train):
    """Latents of both pictures and the instructions, dropped ones too, are the same from the cache."""
    flags = ("--conditioning_dropout_prob", 0.3, "--random_flip", "--center_crop", "--max_train_steps", 8)
    first, second = train("cached", *flags), train("anew", *flags, "--no_encoding_cache")
    assert metrics(first, "loss") == metrics(second, "loss") and same(weights(first), weights(second))


def exec_card(out, edits, monkeypatch):
    """Runs the lines of a run's card; the picture has the run's size."""
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(out.parent)
    shutil.copy(edits / "others" / "0.png", "picture.png")
    exec(code.replace("image=picture", "image=picture, num_inference_steps=2"), {})
    assert Image.open("edited.png").size == (32, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_edits(base, family, train, edits, tmp_path, monkeypatch):
    """It loads as a pipeline that edits, by generate.py as well, and is trained further with its 8 channels."""
    flags = ("--validation_prompt", "make it red", "--val_image_url", edits / "others" / "0.png")
    out = train("out", *flags, "--num_validation_images", 1, "--validation_steps", 3, base=base)
    assert Image.open(out / "samples" / "step-000003.png").size == (64, 32)  # the original and the edit
    pipeline = DiffusionPipeline.from_pretrained(out)
    assert "InstructPix2Pix" in type(pipeline).__name__ and pipeline.unet.config.in_channels == 8
    words = ("--model", out, "--prompt", "make it red", "--num_inference_steps", 2)
    words += ("--height", 32, "--width", 32) if "xl" in family else ()
    run(generate, *words, "--image", edits / "others" / "1.png", "--output_dir", tmp_path / "drawn")
    assert (tmp_path / "drawn" / "pictures" / "00000-0.png").exists()
    second = train("second", "--learning_rate", 1e-12, *flags, base=out)
    assert Image.open(second / "samples" / "step-000003.png").size[1] == 32
    assert type(DiffusionPipeline.from_pretrained(second)) is type(pipeline)
    exec_card(second, edits, monkeypatch)
    before = UNet2DConditionModel.from_pretrained(out, subfolder="unet").state_dict()
    after = UNet2DConditionModel.from_pretrained(second, subfolder="unet").state_dict()
    assert all(torch.allclose(before[name], after[name], atol=1e-4) for name in before)


def test_gradients_reach_the_unet_alone(train, tiny_model):
    """The new channels learn, and text encoder and VAE stay."""
    out = train("out", "--max_train_steps", 2)
    unet = UNet2DConditionModel.from_pretrained(out, subfolder="unet")
    assert unet.conv_in.weight[:, 4:].abs().min() > 0
    base, result = DiffusionPipeline.from_pretrained(tiny_model), DiffusionPipeline.from_pretrained(out)
    for part in ("vae", "text_encoder"):
        assert same(getattr(base, part).state_dict(), getattr(result, part).state_dict())


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--conditioning_dropout_prob 0.5", "from 0.0 to 0.333"),
        ("--validation_prompt a", "give both --val_image_url_or_path and --validation_prompt"),
        ("--validation_prompt a --val_image_url nowhere.png", "--val_image_url_or_path nowhere.png is not there"),
        ("--vae_precision fp16", "SDXL's VAE runs in float32"),
        ("--validation_image_guidance_scale 0.5", "from 1.0"),
    ],
)
def test_flags_that_are_refused(capsys, edits, flags, said):
    words = ["--pretrained_model_name_or_path", "a/b", "--train_data_dir", str(edits), "--output_dir", "out"]
    with pytest.raises(SystemExit):
        script.parse_args([*words, *flags.split()])
    assert said in capsys.readouterr().err


def test_sdxl_drops_both_embeddings(tiny_sdxl_model, edits):
    """A dropped instruction is what the pipeline has for none: zeros, of the hidden states and of the pooled ones."""
    _, models, samples = made(tiny_sdxl_model, edits, "--conditioning_dropout_prob", 0.3333)
    batch = torch.utils.data.default_collate([samples[epoch, 0] for epoch in range(12)])
    dropped = [caption == "" for caption in batch["caption"]]
    assert {*dropped} == {True, False}
    with torch.no_grad():
        _, hidden, added = script.encode_batch(models, batch)
    assert [not row.any() for row in hidden] == dropped
    assert [not row.any() for row in added["text_embeds"]] == dropped


def test_the_original_is_read_once(train, edits, tmp_path, monkeypatch, hub):
    """The picture of the grids is fetched before the base is loaded, and never again."""
    loaded, load_image = [], script.load_image
    monkeypatch.setattr(script, "load_image", lambda name: loaded.append(name) or load_image(name))
    flags = ("--validation_prompt", "a", "--num_validation_images", 2, "--validation_steps", 1)
    hub.add_folder("datasets/me/edits", edits)
    train("out", *flags, "--val_image_url", f"{hub.url}/datasets/me/edits/resolve/main/others/0.png")
    assert len(loaded) == 1
    (tmp_path / "torn.png").write_bytes(b"torn")
    with pytest.raises(SystemExit, match="--val_image_url_or_path .*torn.png cannot be read"):
        train("torn", *flags, "--val_image_url", tmp_path / "torn.png")
    with pytest.raises(SystemExit, match="--val_image_url_or_path http://127.0.0.1:1/a.png cannot be read"):
        train("web", *flags, "--val_image_url", "http://127.0.0.1:1/a.png")


def test_a_checkpoint_edits(train, edits, tmp_path):
    """generate.py puts a checkpoint's UNet, or the average, with its 8 channels onto the base."""
    out = train("out", "--use_ema", "--checkpointing_steps", 3)
    drawn = []
    for model in (out, out / "checkpoint-3", out / "checkpoint-3" / "unet_ema"):
        words = ("--model", model, "--prompt", "make it red", "--image", edits / "others" / "0.png")
        run(generate, *words, "--num_inference_steps", 2, "--output_dir", tmp_path / f"drawn-{len(drawn)}")
        drawn.append(np.asarray(Image.open(tmp_path / f"drawn-{len(drawn)}" / "pictures" / "00000-0.png")))
    assert (drawn[0] == drawn[2]).all() and (drawn[0] != drawn[1]).any()


def test_another_revision_of_the_unet(tiny_model, edits, tmp_path, hub, train):
    """--non_ema_revision trains another UNet, widened as the base's is."""
    old = shutil.copytree(tiny_model, tmp_path / "old")
    scale_weight(old, "unet")
    hub.add_folder("me/base", tiny_model)
    hub.add_folder("me/base@old", old)
    with pytest.raises(SystemExit):
        train("here", "--non_ema_revision", "old")
    flags = ("--learning_rate", 0, "--use_ema", "--checkpointing_steps", 3, "--cache_dir", tmp_path / "hub")
    out = train("out", "--non_ema_revision", "old", *flags, base="me/base")
    found = UNet2DConditionModel.from_pretrained(out / "checkpoint-3" / "unet").state_dict()
    found["conv_in.weight"] = found["conv_in.weight"][:, :4]
    assert same(found, UNet2DConditionModel.from_pretrained(old, subfolder="unet").state_dict())


def test_the_bases_settings_are_kept(tiny_sdxl_model, train, tmp_path):
    """A base that encodes empty prompts instead of zeros leaves an editor that does, too."""
    base = changed(tiny_sdxl_model, tmp_path / "base", "model_index.json", force_zeros_for_empty_prompt=False)
    out = train("out", base=base)
    assert json.loads((out / "model_index.json").read_text())["force_zeros_for_empty_prompt"] is False


# What the example script is tested with.
TRIED = "--dataset_name=hf-internal-testing/instructpix2pix-10-samples --resolution=64 --random_flip --seed=0 "
TRIED += "--train_batch_size=1 --checkpointing_steps=2"


def test_the_examples_own_tests(tiny_model, edits, hub, tmp_path, monkeypatch):
    """Its commands leave the checkpoints that they ask for."""
    monkeypatch.chdir(tmp_path)
    hub.add_folder("hf-internal-testing/tiny", tiny_model)
    hub.add_folder("datasets/hf-internal-testing/instructpix2pix-10-samples", edits)
    words = ["--pretrained_model_name_or_path=hf-internal-testing/tiny", *TRIED.split(), "--cache_dir", "hub"]

    def left(name, *flags):
        run(script, *words, "--output_dir", name, *flags)
        return {path.name for path in Path(name).glob("checkpoint*")}

    assert left("few", "--max_train_steps=6", "--checkpoints_total_limit=2") == {"checkpoint-4", "checkpoint-6"}
    assert left("all", "--max_train_steps=4") == {"checkpoint-2", "checkpoint-4"}
    more = ("--max_train_steps=8", "--resume_from_checkpoint=checkpoint-4", "--checkpoints_total_limit=2")
    assert left("all", *more) == {"checkpoint-6", "checkpoint-8"}
