"""train_controlnet.py: pairs of pictures from everywhere, the loss by hand, what is trained, resuming, what loads."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from diffusers import ControlNetModel, DiffusionPipeline
from helpers import everything, flags_of, make_picture, make_run, metrics, run, same, save_pairs, scale_weight, weights
from PIL import Image

import generate
import train_controlnet as script


FAMILIES = ["tiny_model", "tiny_sd2_model", "tiny_sdxl_model"]
FLAGS = ("--max_train_steps", 3, "--learning_rate", 1e-2, "--resolution", 32)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder of four pairs."""
    return save_pairs(tmp_path_factory.mktemp("pairs") / "data")


@pytest.fixture
def train(tiny_model, pairs, tmp_path, monkeypatch):
    """Trains a ControlNet of a tiny base."""
    monkeypatch.setattr(script, "SAMPLER_STEPS", 2)

    def into(name, *flags, base=tiny_model):
        run(script, *flags_of(base, pairs, tmp_path / name, *FLAGS, *flags))
        return tmp_path / name

    return into


def records_of(*flags):
    """The records that a command reads, by the names of their files."""
    words = ["--pretrained_model_name_or_path", "me/model", "--output_dir", "nowhere", *flags]
    return script.read_records(script.parse_args([str(word) for word in words]))


# The pairs.


def test_pairs_of_metadata(pairs):
    """A column names the control pictures, which are not trained on; the same in a .csv, and under the bare name."""
    records = records_of("--train_data_dir", pairs)
    assert [record["name"] for record in records] == [str(pairs / "pictures" / f"{i}.png") for i in range(4)]
    controls = [record["others"]["control"]["name"] for record in records]
    assert controls == [str(pairs / "others" / f"{i}.png") for i in range(4)]


def test_pairs_of_two_folders(pairs, tmp_path, capsys):
    """Each control picture has the place and name of its picture; captions stand beside the pictures."""
    shutil.copytree(pairs / "pictures", tmp_path / "pictures" / "deep")
    for i in range(4):
        (tmp_path / "pictures" / "deep" / f"{i}.txt").write_text(f"number {i}")
        (tmp_path / "others" / "deep").mkdir(parents=True, exist_ok=True)
        Image.open(pairs / "others" / f"{i}.png").save(tmp_path / "others" / "deep" / f"{i}.jpg")
    flags = ("--train_data_dir", tmp_path / "pictures", "--conditioning_data_dir", tmp_path / "others")
    records = records_of(*flags)
    controls = [record["others"]["control"]["name"] for record in records]
    assert controls == [str(tmp_path / "others" / "deep" / f"{i}.jpg") for i in range(4)]
    (tmp_path / "others" / "deep" / "2.jpg").unlink()
    (tmp_path / "others" / "other.jpg").write_bytes(b"")
    assert "has no picture deep/2 in " in records_of(*flags)[2]["problem"]
    assert "passed over: 1 .jpg" in capsys.readouterr().out
    shutil.copy(pairs / "others" / "3.png", tmp_path / "others" / "deep" / "3.png")
    with pytest.raises(SystemExit, match="has two pictures deep/3: keep one"):
        records_of(*flags)
    (tmp_path / "pictures" / "rows.parquet").write_bytes(b"")
    for file in (tmp_path / "pictures" / "deep").iterdir():
        file.unlink()
    with pytest.raises(SystemExit, match="--conditioning_data_dir goes with pictures"):
        records_of(*flags)


def test_one_letter_or_two(tmp_path):
    """Names that two systems write unlike are the same."""
    make_picture(tmp_path / "pictures" / "caf\u00e9.png")
    make_picture(tmp_path / "others" / "cafe\u0301.png")
    (tmp_path / "pictures" / "caf\u00e9.txt").write_text("a cup")
    flags = ("--train_data_dir", tmp_path / "pictures", "--conditioning_data_dir", tmp_path / "others")
    (record,) = records_of(*flags)
    assert record["others"]["control"]["name"] == str(tmp_path / "others" / "cafe\u0301.png")


def test_pairs_of_parquet(pairs, train, tmp_path, tiny_model):
    """Two columns of pictures train to the same bits as a folder."""
    rows = [json.loads(line) for line in (pairs / "metadata.jsonl").read_text().splitlines()]
    columns = {"image": "file_name", "conditioning_image": "conditioning_image_file_name"}
    table = {name: [str(pairs / row[key]) for row in rows] for name, key in columns.items()}
    table["text"] = [row["text"] for row in rows]
    data = Dataset.from_dict(table)
    for name in columns:
        data = data.cast_column(name, ImageFeature())
    (tmp_path / "parquet").mkdir()
    data.to_parquet(tmp_path / "parquet" / "data.parquet")
    first, second = train("folder"), tmp_path / "rows"
    run(script, *flags_of(tiny_model, tmp_path / "parquet", second, *FLAGS))
    assert same(weights(first), weights(second)) and metrics(first, "loss") == metrics(second, "loss")


@pytest.mark.parametrize(
    "change, said",
    [
        ("missing", "goes with control .*1.png, which is named, by metadata"),
        ("shape", "1.png is 56 x 48, and its control .*1.png is 48 x 48: give both the same shape"),
        ("column", "has no column 'conditioning_image_file_name' or 'conditioning_image', but"),
        ("row", "1.png has no picture conditioning_image in the metadata"),
        ("broken", "goes with control .*1.png, which is not a picture"),
    ],
)
def test_pairs_that_are_refused(pairs, train, tmp_path, tiny_model, change, said):
    """The sentence names both files, before a model loads; --on_bad_image skip leaves the pair out."""
    data = shutil.copytree(pairs, tmp_path / "data")
    control = data / "others" / "1.png"
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    if change == "missing":
        control.unlink()
    elif change == "shape":
        Image.open(control).resize((48, 48)).save(control)
    elif change == "broken":
        control.write_bytes(b"torn")
    elif change == "row":
        rows[1].pop("conditioning_image_file_name")
    else:
        rows = [{"file_name": row["file_name"], "text": row["text"]} for row in rows]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match=said):
        run(script, *flags_of(tiny_model, data, tmp_path / "out", *FLAGS))
    if change != "column":
        run(script, *flags_of(tiny_model, data, tmp_path / "out", *FLAGS, "--on_bad_image", "skip"))


def test_a_pixel_less_is_no_other_shape():
    """Controls may be of another size, and rounded to whole pixels."""

    def problem(size, other):
        return script.pair_problem({"size": size, "others": {"c": {"name": "c.png", "size": other}}})

    assert problem((512, 512), (512, 513)) is None and problem((1024, 767), (512, 384)) is None
    assert problem((4, 4), (4, 4)) is None and problem((4, 1), (1024, 256)) is None
    assert "give both the same shape" in problem((512, 512), (512, 515))


def test_a_changed_control_is_another_data_set(train, pairs, tiny_model, tmp_path):
    """A run does not go on with other control pictures."""
    data = shutil.copytree(pairs, tmp_path / "data")
    flags = flags_of(tiny_model, data, tmp_path / "out", *FLAGS, "--checkpointing_steps", 1)
    run(script, *flags)
    Image.new("RGB", (48, 48), "blue").save(data / "others" / "0.png")
    with pytest.raises(SystemExit, match="was trained with another data set"):
        run(script, *flags, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")


@pytest.mark.parametrize("flip", ["--random_flip", "--no-random_flip"])
def test_control_and_picture_are_cut_alike(tmp_path, flip):
    """The same pixels in both files give the same crop, in [-1, 1] and [0, 1]."""
    data = save_pairs(tmp_path / "data", count=2, wider=40)
    for i in range(2):
        shutil.copy(data / "pictures" / f"{i}.png", data / "others" / f"{i}.png")
    words = ["--pretrained_model_name_or_path", "a/b", "--train_data_dir", str(data), "--output_dir", "out"]
    args = script.parse_args([*words, "--resolution", "32", "--no-center_crop", flip])
    begun = make_run(script, args)
    records = script.check_records(begun, script.read_records(args))
    samples = script.Samples(args, records, 0, 32, (4, 16, 16), 1000)
    seen = set()
    for key in [(epoch, index) for epoch in range(4) for index in range(2)]:
        crop = samples.choose_crop(key)
        control = (samples.pixels(crop._replace(of="control")) + 1) / 2
        torch.testing.assert_close(2 * control - 1, samples.pixels(crop))
        assert 0 <= control.min() and control.max() <= 1
        seen.add(crop)
    assert len(seen) > 4 and any(crop.flip for crop in seen) == (flip == "--random_flip")


# The method.


def made(base, pairs):
    """A run's flags, its models before training, and a batch of three samples."""
    words = flags_of(base, pairs, "out", *FLAGS, "--no_encoding_cache")
    args = script.parse_args([str(word) for word in words])
    begun = make_run(script, args)
    models = script.load_models(begun)
    records = script.check_records(begun, script.read_records(args))
    samples = script.Samples(args, records, 0, 32, models.sample_shape, 1000)
    samples.tokenizers = models.tokenizers
    return args, models, torch.utils.data.default_collate([samples[0, i] for i in range(3)])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_controlnet_changes_nothing(base, family, pairs):
    """Its last layers are zero, so the first loss is the base's, and gradients reach these layers alone."""
    args, models, batch = made(base, pairs)
    loss = script.compute_loss(models, batch, args)["loss"]
    loss.backward()
    moved = {name for name, weight in models.controlnet.named_parameters() if weight.grad.any()}
    last = ("controlnet_down_blocks", "controlnet_mid_block")
    assert moved == {name for name, _ in models.controlnet.named_parameters() if name.startswith(last)}
    assert all(weight.grad is None for weight in models.unet.parameters())
    with torch.no_grad():
        for weight in models.controlnet.parameters():
            weight.zero_()
        assert script.compute_loss(models, batch, args)["loss"].item() == pytest.approx(loss.item(), rel=1e-6)


def test_loss_by_hand(tiny_model, pairs):
    """The UNet with the ControlNet's residuals predicts the noise; the mean square over all samples."""
    args, models, batch = made(tiny_model, pairs)
    torch.manual_seed(0)
    for parameter in models.controlnet.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    with torch.no_grad():
        found = script.compute_loss(models, batch, args)["loss"].item()
        posterior = models.vae.encode(batch["pixel_values"]).latent_dist
        latents = (posterior.mean + posterior.std * batch["posterior_noise"]) * models.vae.config.scaling_factor
        alpha = models.noise_scheduler.alphas_cumprod[batch["timesteps"]][:, None, None, None]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * batch["noise"]
        hidden = models.text_encoders[0](batch["input_ids"][:, 0])[0]
        down, middle = models.controlnet(noisy, batch["timesteps"], hidden, batch["control"], return_dict=False)
        plain = models.unet(noisy, batch["timesteps"], hidden).sample
        given = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        pred = models.unet(noisy, batch["timesteps"], hidden, **given).sample
    assert found == pytest.approx((pred - batch["noise"]).square().mean().item(), rel=1e-4)
    assert found != pytest.approx((plain - batch["noise"]).square().mean().item(), rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_resuming_is_exact(base, family, train):
    """After a stop at each step, with everything random: the same weights, average, losses."""
    flags = ("--max_train_steps", 4, "--checkpointing_steps", 1, "--use_ema", "--random_flip", "--no-center_crop")
    flags += ("--proportion_empty_prompts", 0.3, "--noise_offset", 0.1, "--validation_samples", 1)
    whole = train("whole", *flags, base=base)
    for step in (1, 2, 3):
        part = train(f"from-{step}", *flags, "--max_train_steps", step, base=base)
        out = train(f"from-{step}", *flags, "--resume_from_checkpoint", "latest", base=base)
        assert part == out and same(weights(out), weights(whole))
        assert metrics(out, "loss")[step:] == metrics(whole, "loss")[step:]
        assert same(everything(out / "checkpoint-4"), everything(whole / "checkpoint-4"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_loads(base, family, train, pairs, tmp_path):
    """By diffusers, by the card's lines, and by generate.py; the picture depends on the control."""
    control = pairs / "others" / "0.png"
    flags = ("--validation_prompt", "a cat", "--validation_image", control, "--num_validation_images", 1)
    out = train("out", *flags, "--validation_steps", 3, base=base)
    assert Image.open(out / "samples" / "step-000003.png").size == (64, 32)  # the control and the picture
    pipeline = DiffusionPipeline.from_pretrained(base)
    assert {*ControlNetModel.from_pretrained(out).state_dict()} and "ControlNetModel.from_pretrained" in (
        out / "README.md"
    ).read_text()
    pictures = []
    for number in range(2):
        words = ("--model", out, "--prompt", "a cat", "--num_inference_steps", 2, "--height", 32, "--width", 32)
        words += ("--image", pairs / "others" / f"{number}.png", "--output_dir", tmp_path / f"drawn-{number}")
        run(generate, *words)
        pictures.append(np.asarray(Image.open(tmp_path / f"drawn-{number}" / "pictures" / "00000-0.png")))
    assert pipeline.unet.config.cross_attention_dim and (pictures[0] != pictures[1]).any()


def test_a_controlnet_is_trained_further(train, tiny_model, tiny_sdxl_model, pairs, tmp_path):
    """It starts from its weights; one of another base is refused."""
    first = train("first")
    second = train("second", "--controlnet_model_name_or_path", first, "--learning_rate", 1e-12)
    for name, weight in weights(second).items():
        torch.testing.assert_close(weight, weights(first)[name], atol=1e-4, rtol=1e-3)
    with pytest.raises(SystemExit, match="is for another base: cross_attention_dim, addition_embed_type differ"):
        train("third", "--controlnet_model_name_or_path", first, base=tiny_sdxl_model)


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--validation_prompt a b", "give both --validation_prompt and --validation_image"),
        ("--validation_prompt a b c --validation_image x.png y.png", "there are 3 prompts and 2 --validation_image"),
        ("--validation_prompt a --validation_prompts b --validation_image x.png", "not both"),
        ("--validation_prompt a --validation_image nowhere.png", "--validation_image nowhere.png is not there"),
        ("--conditioning_data_dir nowhere", "--conditioning_data_dir nowhere is not a folder"),
        ("--tokenizer_name x", "the tokenizer has to be the base model's"),
    ],
)
def test_flags_that_are_refused(capsys, tmp_path, pairs, flags, said):
    with pytest.raises(SystemExit):
        records_of("--train_data_dir", pairs, *flags.split())
    assert said in capsys.readouterr().err


def test_validation_pairs(pairs):
    """One prompt for several pictures, or the other way, as often as is asked for; a config gives the same again."""
    words = ["--pretrained_model_name_or_path", "a/b", "--train_data_dir", str(pairs), "--output_dir", "out"]
    images = ["--validation_image", *(str(pairs / "others" / f"{i}.png") for i in range(2))]

    def prompts(*flags):
        return script.parse_args([*words, *images, *flags]).validation_prompts

    assert prompts("--validation_prompt", "x", "--num_validation_images", "2") == ["x"] * 4
    assert prompts("--validation_prompt", "x", "y", "--num_validation_images", "2") == ["x", "x", "y", "y"]
    assert prompts("--validation_prompts", "x", "x", "y", "y") == ["x", "x", "y", "y"]
    assert prompts("--validation_prompts", "x") == ["x", "x"]
    images[2:] = []
    assert prompts("--validation_prompts", "x", "y", "z") == ["x", "y", "z"]


def test_each_prompt_has_its_picture(train, pairs, monkeypatch):
    """The pictures of a prompt stand beside its control, as often as they are drawn; the config does it again."""
    for color in ("red", "blue"):
        Image.new("RGB", (40, 40), color).save(pairs.parent / f"{color}.png")
    files = [pairs.parent / "red.png", pairs.parent / "blue.png"]
    flags = ("--validation_image", *files, "--validation_steps", 3, "--num_validation_images", 2)
    out = train("out", "--validation_prompt", "a", "b", *flags)
    again = train("again", "--config", out / "train_args.yaml")
    for folder in (out, again):
        sheet = Image.open(folder / "samples" / "step-000003.png")
        assert sheet.size == (4 * 64, 32)
        seen = [sheet.getpixel((64 * i + 16, 16)) for i in range(4)]
        assert seen == [(255, 0, 0)] * 2 + [(0, 0, 255)] * 2
    pixels = [Image.open(folder / "samples" / "step-000003.png").tobytes() for folder in (out, again)]
    assert pixels[0] == pixels[1]


def test_16_bits_and_transparency(train, pairs, tmp_path):
    """Controls of the grids and of generate.py are read as those of the training: depth maps, masks on white."""
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    clear = np.zeros((32, 32, 4), dtype=np.uint8)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    files = (tmp_path / "deep.png", tmp_path / "clear.png")
    out = train("out", "--validation_prompt", "a", "--validation_image", *files, "--num_validation_images", 1)
    sheet = np.asarray(Image.open(out / "samples" / "step-000003.png")).astype(int)
    assert abs(sheet[:, :32, 0] - ramp // 257).max() <= 1 and (sheet[:, 64:96] == 255).all()
    for file in files:
        opened = np.asarray(generate.open_picture(file)).astype(int)
        wanted = np.asarray(script.open_image(file.read_bytes()).convert("RGB")).astype(int)
        assert abs(opened - wanted).max() <= 1


def test_sdxl_is_told_of_each_crop(tiny_sdxl_model, pairs):
    """Each sample has the size of its own file and the corner of its own crop."""
    _, _, batch = made(tiny_sdxl_model, pairs)
    sizes = [(48, 48 + 8 * i) for i in range(3)]
    assert [tuple(row) for row in batch["time_ids"][:, :2].tolist()] == sizes
    assert len({tuple(row) for row in batch["time_ids"][:, 2:4].tolist()}) > 1


def test_label_maps_keep_their_labels(pairs):
    """With nearest_exact, the control has no other values than its file, and the picture is resized as ever."""
    words = ["--pretrained_model_name_or_path", "a/b", "--train_data_dir", str(pairs), "--output_dir", "out"]
    args = script.parse_args([*words, "--conditioning_interpolation_mode", "nearest_exact"])
    samples = script.Samples(args, [{"name": str(pairs / "others" / "0.png"), "rows": None}], 0, 32, (4, 16, 16), 1000)
    record = samples.records[0]
    record |= {"digest": script.digest((pairs / "others" / "0.png").read_bytes()), "size": (48, 48)}
    crop = samples.choose_crop((0, 0))
    values = {*np.asarray(Image.open(record["name"])).reshape(-1).tolist()}
    near = samples.pixels(crop, "nearest_exact")
    assert {round(value) for value in ((near + 1) * 127.5).reshape(-1).tolist()} <= values
    assert not torch.equal(near, samples.pixels(crop)) and torch.equal(
        samples.pixels(crop, "lanczos"), samples.pixels(crop)
    )


def test_another_base_is_another_run(train, tiny_model, tmp_path):
    """As the base is frozen, all of it has to be the same on resuming."""
    changed_unet = shutil.copytree(tiny_model, tmp_path / "changed")
    scale_weight(changed_unet, "unet")
    flags = ("--checkpointing_steps", 1, "--max_train_steps", 2)
    train("out", *flags)
    with pytest.raises(SystemExit, match="base model"):
        train("out", *flags, "--max_train_steps", 3, "--resume_from_checkpoint", "latest", base=changed_unet)


def test_a_broken_control_of_the_grids(train, tmp_path):
    """It is named before a model loads."""
    (tmp_path / "torn.png").write_bytes(b"torn")
    with pytest.raises(SystemExit, match="--validation_image .*torn.png cannot be read"):
        train("out", "--validation_prompt", "a", "--validation_image", tmp_path / "torn.png")


def test_a_checkpoint_draws(train, pairs, tmp_path):
    """generate.py takes a checkpoint, which holds the weights, and its average."""
    out = train("out", "--use_ema", "--checkpointing_steps", 3, "--learning_rate", 1)
    control = pairs / "others" / "0.png"
    drawn = []
    for model in (out, out / "checkpoint-3", out / "checkpoint-3" / "unet_ema"):
        words = ("--model", model, "--prompt", "a", "--image", control, "--num_inference_steps", 2)
        run(generate, *words, "--output_dir", tmp_path / f"drawn-{len(drawn)}")
        drawn.append(np.asarray(Image.open(tmp_path / f"drawn-{len(drawn)}" / "pictures" / "00000-0.png")))
    assert drawn[0].shape == (32, 32, 3)
    assert (drawn[0] == drawn[2]).all() and (drawn[0] != drawn[1]).any()


# What the example scripts are tested with.
TRIED = "--dataset_name=hf-internal-testing/fill10 --resolution=64 --train_batch_size=1 --checkpointing_steps=2 "
TRIED += "--gradient_accumulation_steps=1"


@pytest.mark.parametrize("family", ["tiny_model", "tiny_sdxl_model"])
def test_the_examples_own_tests(base, family, pairs, hub, tmp_path, monkeypatch):
    """Their commands leave the checkpoints, and the result, that they ask for."""
    monkeypatch.chdir(tmp_path)
    hub.add_folder("hf-internal-testing/tiny", base)
    hub.add_folder("datasets/hf-internal-testing/fill10", pairs)
    unet = DiffusionPipeline.from_pretrained(base).unet
    ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32)).save_pretrained("tiny-controlnet")
    hub.add_folder("hf-internal-testing/tiny-controlnet", tmp_path / "tiny-controlnet")
    words = ["--pretrained_model_name_or_path=hf-internal-testing/tiny", *TRIED.split()]
    words += ["--controlnet_model_name_or_path=hf-internal-testing/tiny-controlnet", "--cache_dir", "hub"]

    def left(name, *flags):
        run(script, *words, f"--output_dir={name}", *flags)
        return {path.name for path in Path(name).glob("checkpoint*")}

    assert left("few", "--max_train_steps=6", "--checkpoints_total_limit=2") == {"checkpoint-4", "checkpoint-6"}
    assert left("all", "--max_train_steps=6") == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    more = ("--max_train_steps=8", "--resume_from_checkpoint=checkpoint-6", "--checkpoints_total_limit=2")
    assert left("all", *more) == {"checkpoint-6", "checkpoint-8"}
    assert Path("all", "diffusion_pytorch_model.safetensors").is_file()
