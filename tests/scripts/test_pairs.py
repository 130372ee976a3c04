"""What both methods of pairs have to keep: stops, kills, processes, precisions and sample grids change nothing."""

import functools
import importlib
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from helpers import (
    everything,
    finish,
    flags_of,
    linux,
    litter,
    logged,
    make_run,
    metrics,
    rows,
    run,
    same,
    save_pairs,
    watch,
    weights,
    whole_checkpoints,
)
from PIL import Image, ImageOps
from safetensors.torch import load_file


METHODS = {
    "train_controlnet": (),
    "train_instruct_pix2pix": ("--original_image_column", "conditioning_image", "--edit_prompt_column", "text")
    + ("--conditioning_dropout_prob", 0.2),
}
RICH = ("--max_train_steps", 4, "--use_ema", "--random_flip", "--no-center_crop", "--learning_rate", 1e-2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of four pairs."""
    return save_pairs(tmp_path_factory.mktemp("pairs") / "data")


@pytest.fixture(params=METHODS)
def method(request):
    """The name of a script."""
    return request.param


@pytest.fixture
def words(method, tiny_model, data, tmp_path):
    """words(name, *flags): the command line of a run into a folder."""

    def of(name, *flags, base=tiny_model):
        shared = ("--encoding_cache_dir", tmp_path / "cache", *METHODS[method], *RICH)
        return flags_of(base, data, tmp_path / name, *shared, *flags)

    return of


@pytest.fixture
def train(method, words, tmp_path, monkeypatch):
    """train(name, *flags) trains in this process, and returns the folder."""
    script = importlib.import_module(method)
    monkeypatch.setattr(script, "SAMPLER_STEPS", 2)

    def into(name, *flags, **options):
        run(script, *words(name, *flags, **options))
        return tmp_path / name

    return into


@pytest.fixture
def grids(method, data):
    """The flags of sample grids: two pictures of two prompts."""
    if method == "train_controlnet":
        files = [data / "others" / f"{i}.png" for i in (1, 2)]
        return ("--validation_prompt", "red", "--validation_image", *files, "--num_validation_images", 1)
    return ("--validation_prompts", "red", "green", "--val_image_url_or_path", data / "others" / "1.png")


def by_hand(file, mirrored):
    """A picture as a sample of 32 pixels should have it, in [-1, 1]."""
    image = Image.open(file).resize((32, 32), Image.Resampling.LANCZOS)
    image = ImageOps.mirror(image) if mirrored else image
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def test_a_sample_is_its_two_files(method, words, tmp_path, monkeypatch):
    """Each of the two is its own file, mirrored if the other one is; a control is in [0, 1]."""
    script, folder = importlib.import_module(method), save_pairs(tmp_path / "square", wider=0)
    args = script.parse_args(words("out", "--train_data_dir", folder, "--center_crop"))
    records = script.check_records(make_run(script, args), script.read_records(args))
    samples = script.Samples(args, records, 0, 32, (4, 16, 16), 1000)
    monkeypatch.setattr(script, "tokenize", lambda tokenizers, caption: torch.zeros(1))
    samples.tokenizers, mirrors = [], set()
    for key in [(epoch, index) for epoch in range(4) for index in range(4)]:
        sample, mirrored = samples[key], samples.choose_crop(key).flip
        mirrors.add(mirrored)
        torch.testing.assert_close(sample["pixel_values"], by_hand(folder / f"pictures/{key[1]}.png", mirrored))
        other = by_hand(folder / f"others/{key[1]}.png", mirrored)
        found = 2 * sample["control"] - 1 if "control" in sample else sample["original_pixel_values"]
        torch.testing.assert_close(found, other, atol=1e-5, rtol=0)
    assert mirrors == {True, False}


def test_settings_of_the_loss(method, words, data, tiny_model):
    """Min-SNR weighs each sample by its timestep; a ControlNet's noise offset is added to the noise."""
    script, losses = importlib.import_module(method), {}
    more = {"plain": (), "weighed": ("--snr_gamma", 0.01)}
    if method == "train_controlnet":
        more["offset"] = ("--noise_offset", 0.5)
    for name, flags in more.items():
        args = script.parse_args(words("out", "--no_encoding_cache", *flags))
        begun = make_run(script, args)
        models = script.load_models(begun)
        records = script.check_records(begun, script.read_records(args))
        samples = script.Samples(args, records, 0, 32, models.sample_shape, 1000)
        samples.tokenizers = models.tokenizers
        batches = [torch.utils.data.default_collate([samples[epoch, 0]]) for epoch in range(3)]
        with torch.no_grad():
            losses[name] = [script.compute_loss(models, batch, args)["loss"].item() for batch in batches]
        for batch in batches if name == "offset" else ():
            batch["noise"] = batch["noise"] + 0.5 * batch["offset_noise"]
            args.noise_offset = 0
            with torch.no_grad():
                losses.setdefault("by hand", []).append(script.compute_loss(models, batch, args)["loss"].item())
    alphas = [models.noise_scheduler.alphas_cumprod[batch["timesteps"]].item() for batch in batches]
    snr = [alpha / (1 - alpha) for alpha in alphas]
    wanted = [loss * min(s, 0.01) / s for loss, s in zip(losses["plain"], snr)]
    assert losses["weighed"] == pytest.approx(wanted, rel=1e-4) and losses["weighed"] != losses["plain"]
    if "offset" in losses:
        assert losses["offset"] == pytest.approx(losses["by hand"], rel=1e-5) and losses["offset"] != losses["plain"]


def trained(method, out):
    """The weights of a result that were trained."""
    folder = out if method == "train_controlnet" else out / "unet"
    return load_file(folder / "diffusion_pytorch_model.safetensors")


@linux
@pytest.mark.launch
def test_a_signal_and_a_kill(start, method, words, train, tmp_path):
    """SIGTERM ends with 143 and a checkpoint, kill -9 in the midst of one leaves the last; both go on to the same."""
    out, begin = tmp_path / "out", functools.partial(start, script=method)
    arguments = words("out", "--resume_from_checkpoint", "latest", "--max_train_steps", 1000)
    first = begin(arguments)
    first.until(lambda: rows(out) >= 2)
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait() == 143 and "Stopped after step" in first.output(), first.output()
    (stopped,) = whole_checkpoints(out)
    trigger = (rf"checkpoint-{stopped + 2}", 4, ("kill", 0))
    second = begin([*arguments, "--checkpointing_steps", "1"], watched=out, trigger=trigger)
    assert second.wait() == -signal.SIGKILL and whole_checkpoints(out) == [stopped, stopped + 1], second.output()
    length = stopped + 3
    end = ("--max_train_steps", length, "--checkpointing_steps", length)
    train("out", *end, "--resume_from_checkpoint", "latest")
    train("whole", *end)
    assert logged(out) == logged(tmp_path / "whole") and litter(out) == []
    ends = [everything(folder / f"checkpoint-{length}") for folder in (out, tmp_path / "whole")]
    assert same(*ends) and same(trained(method, out), trained(method, tmp_path / "whole"))


@pytest.mark.launch
def test_two_processes_are_one(start, method, words, train, grids, tmp_path):
    """Two processes with half the batch each take the same steps, and share the grids."""
    flags = ("--gradient_accumulation_steps", 2, "--validation_samples", 1, "--validation_steps", 2)
    one = train("one", *flags, *grids, "--train_batch_size", 2)
    finish(functools.partial(start, script=method), words("two", *flags, *grids, "--train_batch_size", 1), 2)
    for name in ("loss", "grad_norm", "validation_loss"):
        wanted = [(step, pytest.approx(value, rel=1e-3)) for step, value in metrics(one, name)]
        assert metrics(tmp_path / "two", name) == wanted
    sheets = [Image.open(folder / "samples" / "step-000004.png").size for folder in (one, tmp_path / "two")]
    assert sheets == [(2 * 64, 32)] * 2
    first, second = weights(one), weights(tmp_path / "two")
    apart = sum((first[name] - second[name]).square().sum() for name in first)
    assert apart < 1e-4 * sum(weight.square().sum() for weight in first.values())


def test_grids_change_nothing(train, grids):
    """Sample grids draw from no generator of the training; each picture stands beside what it was drawn from."""
    plain = train("plain")
    drawn = train("drawn", *grids, "--validation_steps", 1)
    assert same(weights(plain), weights(drawn)) and metrics(plain, "loss") == metrics(drawn, "loss")
    sheet = Image.open(drawn / "samples" / "step-000004.png")
    assert sheet.size == (2 * 64, 32)  # of files of 56 and 64 x 48
    first = next(flag for flag in grids if str(flag).endswith(".png"))
    given = np.asarray(ImageOps.fit(Image.open(first), (32, 32), Image.Resampling.LANCZOS)).astype(int)
    assert (np.asarray(sheet.crop((0, 0, 32, 32))) == given).all()
    assert len(list((drawn / "samples").glob("*.png"))) == 5
    assert "samples/step-000004.png" in (drawn / "README.md").read_text()


def test_half_precision(train, method, grids, monkeypatch):
    """bf16 trains and draws on a CPU, in float32 weights; what is frozen is held in bf16."""
    script = importlib.import_module(method)
    seen = watch(monkeypatch, script)
    slowly = ("--learning_rate", 1e-4)  # or last bits would grow
    out = train("out", *grids, *slowly, "--mixed_precision", "bf16", "--validation_steps", 2)
    assert {weight.dtype for weight in weights(out).values()} == {torch.float32}
    assert seen.dtypes == {torch.bfloat16 if method == "train_controlnet" else torch.float32}
    losses = [value for _, value in metrics(out, "loss")]
    assert losses == [pytest.approx(value, rel=0.05) for _, value in metrics(train("whole", *slowly), "loss")]


def test_gradient_checkpointing(train, method, monkeypatch):
    """It reaches the models that gradients pass through, and changes no more than last bits."""
    script = importlib.import_module(method)
    plain = train("plain")
    seen = watch(monkeypatch, script)
    saving = train("saving", "--gradient_checkpointing")
    models = [seen.models.pipeline.unet] + ([seen.models.saved] if method == "train_controlnet" else [])
    assert all(model.is_gradient_checkpointing for model in models)
    wanted = [(step, pytest.approx(value, rel=1e-5)) for step, value in metrics(plain, "loss")]
    assert metrics(saving, "loss") == wanted


def test_a_loading_script(train, hub, tmp_path, method):
    """A data set that is a program is refused in a sentence with the way out."""
    (tmp_path / "fill50k").mkdir()
    (tmp_path / "fill50k" / "fill50k.py").write_text("print('I could do anything')\n")
    hub.add_folder("datasets/fusing/fill50k", tmp_path / "fill50k")
    with pytest.raises(
        SystemExit, match="fusing/fill50k cannot be loaded: .*scripts.*as parquet files or as a folder"
    ):
        train("out", "--dataset_name", "fusing/fill50k", "--cache_dir", tmp_path / "hub")


def test_the_header_names_a_pair(train, data, method, capsys):
    """So that nobody trains with the two pictures mixed up."""
    train("out", "--max_train_steps", 1, "--no-random_flip")
    name = "control" if method == "train_controlnet" else "original"
    pair = f"{data}/pictures/0.png with its {name} {data}/others/0.png, and so on"
    assert f"pairs      {pair}\n" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["tiny_model", "tiny_sdxl_model"])
def test_the_cache_changes_nothing(train, base, family, method, tmp_path):
    """With captions and latents of both pictures from the cache, a run ends with the same bits as without."""
    flags = ("--center_crop", "--max_train_steps", 12)
    first, second = train("a", *flags, base=base), train("b", *flags, "--no_encoding_cache", base=base)
    assert metrics(first, "loss") == metrics(second, "loss") and same(weights(first), weights(second))
    of_control = method == "train_controlnet"  # whose second picture is not encoded
    entries = {name: len([*(tmp_path / "cache" / name).glob("*")]) for name in ("latents", "prompts")}
    assert entries == {"latents": 8 if of_control else 16, "prompts": 4 if of_control else 5}


def test_pairs_of_a_folder_and_of_a_hub_are_the_same(train, hub, data, method, tmp_path):
    """A data set of the Hub, whose columns are named as the library names them, trains to the same bits."""
    hub.add_folder("datasets/me/pairs", data)
    names = ("--edited_image_column", "image") if method == "train_instruct_pix2pix" else ()
    first = train("folder")
    second = train("hub", "--dataset_name", "me/pairs", "--cache_dir", tmp_path / "downloaded", *names)
    assert metrics(first, "loss") == metrics(second, "loss") and same(weights(first), weights(second))


def test_a_picture_is_in_two_pairs(train, data, tmp_path, method, monkeypatch):
    """One original of several edits is one file; an edit with two originals is refused."""
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    folder = save_pairs(tmp_path / "more", wider=0)
    for line in lines:
        line["conditioning_image_file_name"] = "others/0.png"
    for i in (2, 3):
        (folder / "others" / f"{i}.png").unlink()
    (folder / "others" / "1.png").rename(tmp_path / "1.png")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    script, read = importlib.import_module(method), []
    read_bytes = script.read_bytes
    monkeypatch.setattr(script, "read_bytes", lambda record: read.append(record["name"]) or read_bytes(record))
    words = flags_of("a/b", folder, tmp_path / "out", *METHODS[method], "--no_encoding_cache")
    args = script.parse_args(words)
    script.check_records(make_run(script, args), script.read_records(args))
    assert sorted(read) == sorted({*read}) and len(read) == 5
    assert len(metrics(train("shared", "--train_data_dir", folder), "loss")) == 4
    (tmp_path / "1.png").rename(folder / "others" / "1.png")
    lines.append(lines[0] | {"conditioning_image_file_name": "others/1.png"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SystemExit, match="0.png has two pictures in conditioning_image: copy it under another name"):
        train("twice", "--train_data_dir", folder)
    lines[-1] = lines[1] | {"conditioning_image_file_name": lines[1]["file_name"]}
    lines[1:2] = []
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SystemExit, match="1.png goes with itself in the metadata"):
        train("itself", "--train_data_dir", folder)


def test_two_metadata_files_of_one_picture(train, data, tmp_path):
    """They may say the same of it, and nothing else."""
    folder = shutil.copytree(data, tmp_path / "more")
    row = {"file_name": "0.png", "conditioning_image_file_name": "../others/0.png", "text": "another"}
    for other, said in (("0", None), ("1", "0.png has two pictures in conditioning_image")):
        row["conditioning_image_file_name"] = f"../others/{other}.png"
        (folder / "pictures" / "metadata.jsonl").write_text(json.dumps(row) + "\n")
        if said is None:
            train("alike", "--train_data_dir", folder)
        else:
            with pytest.raises(SystemExit, match=said):
                train("unlike", "--train_data_dir", folder)


def test_a_null_byte_in_a_name(train, tmp_path):
    """It is said of the row, as of the picture's own name."""
    folder = save_pairs(tmp_path / "more", wider=0)
    row = {"file_name": "pictures/0.png", "conditioning_image_file_name": "a\0b/0.png", "text": "x"}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit, match="names no file"):
        train("out", "--train_data_dir", folder)


def test_an_average(train, method):
    """It is what is saved; the checkpoint has it and the weights, which are those of a run without it."""
    out = train("out", "--checkpointing_steps", 4)
    plain = train("plain", "--no-use_ema")
    folder = {"train_controlnet": "controlnet"}.get(method, "unet")
    average, last = (weights(out / "checkpoint-4" / name) for name in ("unet_ema", folder))
    names = [name.split(":")[1] for name in average]
    assert [*average] == [*last] and not same(average, last)
    assert same(trained(method, out), dict(zip(names, average.values())))
    assert same(trained(method, plain), dict(zip(names, last.values())))
