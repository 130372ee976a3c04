"""The cache of latents and embeddings: what an entry depends on, what is encoded once, and that it changes nothing."""

import os
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from helpers import (
    CACHED,
    ENDLESS,
    changed,
    count_calls,
    encode,
    finish,
    flags_of,
    for_each_family,
    litter,
    load,
    logged,
    make_picture,
    metrics,
    rows,
    run,
    same,
    samples_of,
    scale_weight,
    state_of,
    weights,
    whole_checkpoints,
)
from safetensors.torch import load_file
from transformers import CLIPTextModel

import train_text_to_image as script


pytestmark = pytest.mark.usefixtures("own_cache")
FAST = ("--resolution", 16, "--train_batch_size", 1, "--max_train_steps", 3)


# Entries.


def entries(cache):
    """The names of a cache's entries: latents and prompts."""
    return [{file.name for file in (cache / kind).glob("*")} for kind in ("latents", "prompts")]


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """Two pictures that are a pixel wider than high at a resolution of 16, with captions, and the cache of a run."""
    folder = tmp_path_factory.mktemp("made")
    for name, colour in (("a", "red"), ("b", "blue")):
        make_picture(folder / "two" / f"{name}.png", (17, 16), colour)
        (folder / "two" / f"{name}.txt").write_text(name)
    flags = (*FAST, "--max_train_steps", 4, "--encoding_cache_dir", folder / "cache")
    run(script, *flags_of(tiny_model, folder / "two", folder / "out", *flags))
    return folder


@pytest.fixture
def two(made, tmp_path):
    """A copy of these pictures, with a copy of their cache beside it."""
    shutil.copytree(made / "cache", tmp_path / "cache")
    return shutil.copytree(made / "two", tmp_path / "two")


@pytest.mark.parametrize(
    "change, new_latents, new_prompts",
    [
        ("nothing", 0, 0),
        ("name", 0, 0),
        ("unet", 0, 0),
        ("loss", 0, 0),
        ("bytes", 1, 0),
        ("caption", 0, 1),
        ("crop", 2, 0),
        ("flip", 2, 0),
        ("resolution", 2, 0),
        ("interpolation", 2, 0),
        ("vae", 2, 0),
        ("text_encoder", 0, 2),
        ("heads of the text encoder", 0, 2),
        ("precision", 2, 2),
    ],
)
def test_cache_key(train, two, tiny_model, tmp_path, change, new_latents, new_prompts):
    """An entry is made anew when what it depends on changes, and only then."""
    cache, base, flags = tmp_path / "cache", tiny_model, []
    settings = [*FAST, "--encoding_cache_dir", cache, "--max_train_steps", 16]
    before = entries(cache)
    assert [len(kind) for kind in before] == [2, 2]
    if change == "name":
        two.rename(tmp_path / "moved")
        two = tmp_path / "moved"
        for suffix in ("png", "txt"):
            (two / f"a.{suffix}").rename(two / f"c.{suffix}")
    if change == "bytes":
        make_picture(two / "a.png", (17, 16), "green")
    if change == "caption":
        (two / "a.txt").write_text("another")
    if change == "heads of the text encoder":  # of which its weights and layers say nothing
        base = changed(tiny_model, tmp_path / "base", "text_encoder", num_attention_heads=4)
    if change in ("unet", "vae", "text_encoder"):
        base = shutil.copytree(tiny_model, tmp_path / "base")
        scale_weight(base, change)
    flags += {
        "crop": ["--no-center_crop"],
        "flip": ["--random_flip"],
        "resolution": ["--resolution", 24],
        "interpolation": ["--image_interpolation_mode", "box"],
        "loss": ["--snr_gamma", 5, "--seed", 2, "--train_batch_size", 2],
        "precision": ["--mixed_precision", "bf16"],
    }.get(change, [])
    train("out", "--train_data_dir", two, *settings, *flags, base=base)
    assert [len(now - then) for now, then in zip(entries(cache), before)] == [new_latents, new_prompts]
    assert all(then <= now for now, then in zip(entries(cache), before))


def test_cache_folder(train, two, tmp_path, capsys):
    """Entries are kept under XDG_CACHE_HOME, or where --encoding_cache_dir says, and the header names the place."""
    flags = [*FAST, "--max_train_steps", 4]
    train("first", "--train_data_dir", two, *flags)
    default = tmp_path / "xdg" / "diffusion-training"
    assert entries(default) == entries(tmp_path / "cache")
    assert f"GiB in {default}" in capsys.readouterr().out
    before = state_of(default)
    train("second", "--train_data_dir", two, *flags, "--encoding_cache_dir", tmp_path / "moved" / "deep")
    assert entries(tmp_path / "moved" / "deep") == entries(default)
    assert state_of(default) == before
    assert f"GiB in {tmp_path / 'moved' / 'deep'}" in capsys.readouterr().out


def test_no_encoding_cache(train, two, tmp_path, capsys):
    """--no_encoding_cache reads and leaves nothing anywhere but the result."""
    before = state_of(tmp_path)
    train("out", "--train_data_dir", two, *FAST, "--no_encoding_cache", "--encoding_cache_dir", tmp_path / "cache")
    shutil.rmtree(tmp_path / "out")
    assert state_of(tmp_path) == before
    assert "cache      off" in capsys.readouterr().out


def test_caches_do_not_mix_up_empty_prompts(tiny_sdxl_model, tmp_path, train):
    """Two bases that differ in what an empty prompt is share no entry for it."""
    other = changed(tiny_sdxl_model, tmp_path / "base", "model_index.json", force_zeros_for_empty_prompt=False)
    flags = ("--proportion_empty_prompts", 1, "--max_train_steps", 1)
    losses = [metrics(train("zeros", *flags, base=tiny_sdxl_model), "loss")]
    losses += [metrics(train(name, *flags, base=other), "loss") for name in ("words", "again")]
    assert losses[0] != losses[1] == losses[2]


def test_caches_do_not_mix_up_precisions(tiny_sdxl_model, train, tmp_path):
    """A VAE that now may run in half precision is not given what it encoded in float32."""
    other = changed(tiny_sdxl_model, tmp_path / "base", "vae", force_upcast=False)
    flags = ("--mixed_precision", "bf16", "--center_crop", "--max_train_steps", 1)
    full = metrics(train("full", *flags, base=tiny_sdxl_model), "loss")
    half = metrics(train("half", *flags, base=other), "loss")
    assert full != half == metrics(train("new", *flags, "--encoding_cache_dir", tmp_path / "new", base=other), "loss")


def test_caches_do_not_mix_up_padding(tiny_sdxl_model, train, tmp_path):
    """The same words under another padding, which the UNet attends to, are another entry."""
    other = shutil.copytree(tiny_sdxl_model, tmp_path / "base")
    tokenizer = DiffusionPipeline.from_pretrained(other).tokenizer_2
    tokenizer.pad_token = "!</w>"
    tokenizer.save_pretrained(other / "tokenizer_2")
    losses = [
        metrics(train("out" + base.name, "--max_train_steps", 1, base=base), "loss")
        for base in (tiny_sdxl_model, other)
    ]
    new = train("new", "--max_train_steps", 1, "--encoding_cache_dir", tmp_path / "new", base=other)
    assert losses[0] != losses[1] == metrics(new, "loss")


# It changes nothing.


@pytest.mark.parametrize("flags", [(), ("--dream_training",)], ids=["plain", "dream"])
@for_each_family
def test_cached_is_uncached(base, train, flags):
    """The cache changes nothing, in any family."""
    if "sd2" in base.name and flags:
        pytest.skip("DREAM is for epsilon")
    flags = ("--center_crop", "--random_flip", "--proportion_empty_prompts", 0.4, *flags)
    cached, uncached = train("out", *flags, base=base), train("uncached", *flags, "--no_encoding_cache", base=base)
    first, second = weights(cached / "unet"), weights(uncached / "unet")
    start = weights(base / "unet")
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-5)
    assert not same(first, start)
    others = [part for part in ("vae", "text_encoder", "text_encoder_2") if (base / part).exists()]
    assert all(same(weights(cached / part), weights(base / part)) for part in others)


def test_state_of_the_cache(train, dropout_model, plain_run, tmp_path):
    """A cold cache, a warm one, one with torn files and one that another run began give the same weights."""
    cache = tmp_path / "cache"
    flags = ("--pretrained_model_name_or_path", dropout_model, *CACHED, "--encoding_cache_dir", cache)
    wanted = weights(plain_run / "unet")
    assert same(weights(train("cold", *flags) / "unet"), wanted)
    entries = {file: file.read_bytes() for part in ("latents", "prompts") for file in (cache / part).iterdir()}
    assert len(entries) > 15
    assert same(weights(train("warm", *flags) / "unet"), wanted)
    for i, (file, data) in enumerate(entries.items()):
        file.write_bytes(data[: (0, 4, -1)[i % 3]])
    assert same(weights(train("torn", *flags) / "unet"), wanted)
    assert all(file.read_bytes() == data for file, data in entries.items())
    # Another run of fewer pictures writes the same bits for what both visit.
    shutil.rmtree(cache)
    train("fewer", *flags, "--max_train_samples", 2)
    both = [file for file in entries if file.exists()]
    assert len(both) > 3 and all(file.read_bytes() == entries[file] for file in both)
    assert same(weights(train("begun", *flags) / "unet"), wanted)


def test_torn_cache_entries_are_computed_anew(command, tmp_path):
    """An entry that is cut short, empty or overwritten is recomputed, and the weights are the same."""
    cache = tmp_path / "cache"
    flags = ("--max_train_steps", 6, "--checkpointing_steps", 0, "--encoding_cache_dir", cache, "--no-random_flip")
    run(script, *command(tmp_path / "first", *flags))
    entries = sorted(path for kind in ("latents", "prompts") for path in (cache / kind).iterdir())
    before = {path: path.read_bytes() for path in entries}
    assert {path.parent.name for path in entries} == {"latents", "prompts"}
    for path in entries[::2]:
        path.write_bytes(before[path][: len(before[path]) // 2])
    entries[1].write_bytes(b"")
    entries[-1].write_bytes(random.Random(0).randbytes(len(before[entries[-1]])))
    (cache / "checked" / os.listdir(cache / "checked")[0]).write_text("{torn")
    run(script, *command(tmp_path / "second", *flags))
    assert {path: path.read_bytes() for path in entries} == before
    assert same(weights(tmp_path / "first"), weights(tmp_path / "second"))
    assert litter(cache) == []


def test_damaged_entries_are_computed_anew(train, tmp_path):
    """An entry of the right size in which a bit has changed is seen by its digest, and gives no other loss."""
    cache = tmp_path / "cache"
    flags = (*CACHED, "--encoding_cache_dir", cache)
    wanted = weights(train("first", *flags) / "unet")
    entries = {file: file.read_bytes() for part in ("latents", "prompts") for file in (cache / part).iterdir()}
    for file, data in entries.items():
        file.write_bytes(data[:-2] + bytes([data[-2] ^ 64]) + data[-1:])
        load_file(file)
    assert same(weights(train("second", *flags) / "unet"), wanted)
    assert {file: file.read_bytes() for file in entries} == entries


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_that_is_removed(workers, start, command, tmp_path):
    """A run whose cache goes away ends in a sentence that names the entry, and goes on when told to."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    flags = ("--encoding_cache_dir", cache, "--dataloader_num_workers", workers, "--checkpointing_steps", 1)
    process = start(command(out, *ENDLESS, *flags))
    process.until(lambda: rows(out) >= 2)
    shutil.rmtree(cache)
    assert process.wait(30) == 1, process.output()
    said = process.output()
    assert f"The run failed for {out}" in said and f"{cache}/" in said and "Traceback" not in said
    steps = whole_checkpoints(out)[-1] + 1
    finish(start, command(out, *flags, "--max_train_steps", steps, "--resume_from_checkpoint", "latest"))


def test_encoders_take_one_input_at_a_time(tiny_model, monkeypatch):
    """Latents and embeddings are the same bits whatever else is in the call."""
    models = load(tiny_model)
    pipeline = models.pipeline
    pixels = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    prompts = ["a", "a red circle", "", "something else that is rather longer than the others"]
    with torch.no_grad():
        together = script.encode_pixels(models, pixels)
        texts = encode(script, models, prompts)
        assert together.keys() == {"mean", "std"} and together["mean"].shape == (5, 4, 16, 16)
        for i in range(5):
            alone = script.encode_pixels(models, pixels[i : i + 1])
            assert all(torch.equal(alone[name][0], together[name][i]) for name in together)
        for i, prompt in enumerate(prompts):
            alone = encode(script, models, [prompt])
            assert torch.equal(alone["encoder_hidden_states"][0], texts["encoder_hidden_states"][i])
        wanted = pipeline.encode_prompt(prompts[1], "cpu", 1, False)[0]
    torch.testing.assert_close(texts["encoder_hidden_states"][1:2], wanted)


# Planning.


@pytest.fixture
def plan(wide_pictures):
    """plan(count, *flags) plans a run of so many samples: crops, captions, whether to keep the crops, keys taken."""

    def of(count, *flags, signum=0):
        samples = samples_of(wide_pictures, "--resolution", 32, *flags, twice=True)
        taken = []

        def keys():
            for place in range(count):
                taken.append(place)
                yield divmod(place, 5)

        def exit_if_asked():
            if signum:
                raise SystemExit(128 + signum)

        stop = SimpleNamespace(signum=signum, exit_if_asked=exit_if_asked)
        accelerator = SimpleNamespace(is_main_process=False)
        run = SimpleNamespace(args=samples.args, stop=stop, accelerator=accelerator)
        return *script.plan_cache(run, samples, keys(), count, True), taken

    return of


@pytest.mark.parametrize("count", [10**4, 10**12])
def test_planning_ends_once_the_answer_is_certain(plan, monkeypatch, count):
    """All crops and captions of a long run are known after a few passes, whatever its length."""
    fixed, captions, taken = plan(count, "--center_crop", "--random_flip")
    assert (len(fixed), len(captions)) == (10, 10) and len(taken) < 500
    crops, captions, taken = plan(count, "--random_flip", "--proportion_empty_prompts", 0.1)
    assert (len(crops), len(captions)) == (5 * 17 * 2, 11) and len(taken) < 5000
    _, captions, taken = plan(count, "--center_crop", "--proportion_empty_prompts", 1)
    assert captions == {""} and len(taken) < 500
    monkeypatch.setattr(script, "LARGE_SET", 100)
    crops, captions, taken = plan(count, "--random_flip")
    assert crops is None and len(captions) == 10 and len(taken) < 500


def test_planning_counts_a_short_run_whole(plan):
    """What is met less than twice is not kept, unless it is of a small set that does not change."""
    assert plan(20)[0] is None and len(plan(2000)[0]) == 5 * 17
    assert len(plan(4, "--center_crop")[0]) == 4


def test_captions_that_are_met_once(train, own_cache, tmp_path, monkeypatch, capsys):
    """Of many captions that a run meets less than twice none is kept; embeddings, and weights, are the same."""
    kept = train("kept")
    monkeypatch.setattr(script, "SMALL_SET", 3)
    out = train("out", "--dataloader_num_workers", 2)
    said = capsys.readouterr().out
    assert "latents and embeddings are not cached" in said
    assert same(weights(out / "unet"), weights(kept / "unet")) and logged(out) == logged(kept)


def test_planning_answers_signals(plan):
    """It ends at the key at hand."""
    with pytest.raises(SystemExit) as end:
        plan(10**12, "--random_flip", signum=15)
    assert end.value.code == 143


# Work that is done once.


def test_encoders_run_once_an_input(train, monkeypatch, pictures):
    """A run encodes each variant and caption that it visits once, and the next run none of them."""
    images, texts = (
        count_calls(monkeypatch, AutoencoderKL, "encode"),
        count_calls(monkeypatch, CLIPTextModel, "forward"),
    )
    cache = pictures.parent / "cache-once"
    flags = ("--random_flip", "--max_train_steps", 6, "--encoding_cache_dir", cache)
    samples = samples_of(pictures, "--resolution", 32, "--center_crop", *flags, seed=1)
    visited = [samples[key] for step in range(6) for key in script.step_keys(step, 2, (6, 0), 1)]
    variants = {sample["pixel_values"].numpy().tobytes() for sample in visited}
    assert 6 < len(variants) < 12  # else this would not show that only what is visited is cached
    first = train("first", *flags)
    assert (len(images), len(texts)) == (len(variants), 6)
    assert all(len(pixels) == 1 for pixels in images)
    assert len(list((cache / "latents").iterdir())) == len(variants) and len(list((cache / "prompts").iterdir())) == 6
    images.clear()
    texts.clear()
    second = train("second", *flags)
    assert (images, texts) == ([], [])
    assert same(weights(first / "unet"), weights(second / "unet"))


def test_a_short_run_caches_little(train, monkeypatch, tmp_path):
    """Only what the run visits is encoded; crops that it meets once are kept only of a small set, for the next run."""
    images, texts = (
        count_calls(monkeypatch, AutoencoderKL, "encode"),
        count_calls(monkeypatch, CLIPTextModel, "forward"),
    )
    small = train("small", "--max_train_steps", 2, "--encoding_cache_dir", tmp_path / "cache")
    assert (len(images), len(texts)) == (4, 4)
    assert len(list((tmp_path / "cache" / "latents").iterdir())) == 4
    monkeypatch.setattr(script, "SMALL_SET", 3)
    large = train("large", "--max_train_steps", 2, "--encoding_cache_dir", tmp_path / "cache-2")
    assert (len(images), len(texts)) == (8, 8)
    assert not (tmp_path / "cache-2" / "latents").exists() and not (tmp_path / "cache-2" / "prompts").exists()
    assert same(weights(small / "unet"), weights(large / "unet"))


def test_random_crops_are_not_cached(train, monkeypatch, wide_pictures, tmp_path, capsys):
    """Random crops are hardly met twice, so each is encoded in its step, afresh; the header says so."""
    images, texts = (
        count_calls(monkeypatch, AutoencoderKL, "encode"),
        count_calls(monkeypatch, CLIPTextModel, "forward"),
    )
    flags = ("--train_data_dir", wide_pictures, "--no-center_crop", "--encoding_cache_dir", tmp_path / "cache")
    train("out", *flags, "--max_train_steps", 8)
    assert (len(images), len(texts)) == (16, 5)
    assert len({pixels.numpy().tobytes() for pixels in images}) > 10
    assert not (tmp_path / "cache" / "latents").exists()
    assert "latents are not cached" in capsys.readouterr().out


def test_captions_that_are_dropped(train, monkeypatch, tmp_path):
    """The empty caption is encoded once, like any other."""
    texts = count_calls(monkeypatch, CLIPTextModel, "forward")
    train("out", "--proportion_empty_prompts", 1.0, "--encoding_cache_dir", tmp_path / "cache")
    assert len(texts) == 1 and len(list((tmp_path / "cache" / "prompts").iterdir())) == 1


def test_latents_that_are_not_finite_are_not_kept(trainer, own_cache, tiny_model, tmp_path, monkeypatch):
    """In fp16 a picture can overflow: it is named, and no entry is written that every later run would read."""
    encode = script.encode_pixels
    monkeypatch.setattr(script, "encode_pixels", lambda *given: {k: v / 0 for k, v in encode(*given).items()})
    with pytest.raises(SystemExit, match=r"make of '.*\.png' is not finite: take another --mixed_precision"):
        trainer(script)("out", "--center_crop")
    assert list((tmp_path / "xdg").rglob("latents/**/*.safetensors")) == []
