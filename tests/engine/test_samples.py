"""What a sample is: how a picture is decoded, cropped and scaled, and what is drawn for it by its keys."""

import math
import multiprocessing
import resource
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import linux, make_picture, metrics, samples_of, watch, write_metadata
from PIL import Image

import train_text_to_image as script


# What decoding makes of a picture.


def decode(image, kind="PNG", **settings):
    """The pixels of a saved picture as the script opens it."""
    path = Path(f"picture.{kind.lower()}")
    image.save(path, kind, **settings)
    opened = script.open_image(path.read_bytes())
    assert opened.mode == ("F" if image.mode == "I;16" else "RGB")
    return np.asarray(opened).tolist()


def palette(alphas):
    """Two pixels, red and green, whose palette entries have these transparencies."""
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([0, 1])
    image.info["transparency"] = alphas
    return image


DECODED = {
    "RGBA": (Image.fromarray(np.uint8([[[255, 0, 0, 128], [9, 9, 9, 0]]])), [[[255, 127, 127], [255, 255, 255]]]),
    "LA": (Image.fromarray(np.uint8([[[0, 255], [0, 0]]]), "LA"), [[[0, 0, 0], [255, 255, 255]]]),
    "P": (palette(bytes([255, 0])), [[[255, 0, 0], [255, 255, 255]]]),
    "L": (Image.fromarray(np.uint8([[7, 200]])), [[[7, 7, 7], [200, 200, 200]]]),
    "1": (Image.fromarray(np.array([[False, True]])), [[[0, 0, 0], [255, 255, 255]]]),
    "I;16": (Image.fromarray(np.uint16([[0, 32896, 65535]])), [[0.0, 128.0, 255.0]]),
}


def test_integers_of_32_bits(tmp_path):
    """They are taken for the 8 or 16 bits that their values fill, and refused beyond."""
    for highest, unit in ((255, 1), (65535, 257)):
        values = np.linspace(0, highest, 256).astype(np.int32).reshape(16, 16)
        Image.fromarray(values).save(tmp_path / "x.tif")
        assert np.allclose(script.open_image((tmp_path / "x.tif").read_bytes()), values / unit)
    Image.fromarray(np.full((4, 4), 70_000, dtype=np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="70000"):
        script.open_image((tmp_path / "x.tif").read_bytes())


@pytest.mark.parametrize("mode", DECODED)
def test_decoding(tmp_path, monkeypatch, mode):
    """Transparency is laid on white, 16-bit grey is scaled and keeps its precision, and other kinds become RGB."""
    monkeypatch.chdir(tmp_path)
    image, expected = DECODED[mode]
    assert image.mode == mode
    assert decode(image) == expected


def test_decoding_colour_key(tmp_path, monkeypatch):
    """An RGB picture whose one transparent colour is named in its header is laid on white, too."""
    monkeypatch.chdir(tmp_path)
    image = Image.fromarray(np.uint8([[[1, 2, 3], [3, 2, 1]]]))
    assert decode(image, transparency=(1, 2, 3)) == [[[255, 255, 255], [3, 2, 1]]]


def test_decoding_cmyk(tmp_path, monkeypatch):
    """A CMYK picture, as a TIFF or a JPEG, has its colours."""
    monkeypatch.chdir(tmp_path)
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert decode(image, "TIFF") == [[[255, 0, 0]] * 8] * 8
    assert np.abs(np.subtract(decode(image, "JPEG"), (255, 0, 0))).max() < 4


# What a sample makes of a picture.


def ramp(folder, width, height, kind="columns"):
    """Saves a picture whose column x is 8 x grey, or whose row y is 8 y, with a caption."""
    folder.mkdir(exist_ok=True)
    columns = np.tile(np.arange(width) * 8, (height, 1))
    rows = np.tile(np.arange(height) * 8, (width, 1)).T
    Image.fromarray(np.uint8(columns if kind == "columns" else rows)).convert("RGB").save(folder / "a.png")
    (folder / "a.txt").write_text("a ramp")
    return folder


def greys(samples, key=(0, 0)):
    """A sample's pixel values as the 8-bit grey that they were, shape (resolution, resolution)."""
    pixels = samples[key]["pixel_values"]
    side = samples.resolution
    assert pixels.shape == (3, side, side) and pixels.dtype == torch.float32
    assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2])
    return ((pixels[0] + 1) * 127.5).round().int()


def test_center_crop_by_hand(tmp_path):
    """32 x 16 pixels become 16 x 8 by averaging pairs; of these the columns 4 to 11 are the middle."""
    flags = ["--resolution", 8, "--center_crop", "--image_interpolation_mode", "box"]
    wide = greys(samples_of(ramp(tmp_path / "wide", 32, 16), *flags))
    # The mean of 8 (2 x) and 8 (2 x + 1) is 16 x + 4.
    assert wide.tolist() == [[16 * x + 4 for x in range(4, 12)]] * 8
    tall = greys(samples_of(ramp(tmp_path / "tall", 16, 32, "rows"), *flags))
    assert tall.T.tolist() == wide.tolist()


def test_scale_of_pixels(tmp_path):
    """Black is -1 and white is 1."""
    for name, colour in (("a", "black"), ("b", "white")):
        make_picture(tmp_path / f"{name}.png", colour=colour)
        (tmp_path / f"{name}.txt").write_text(name)
    samples = samples_of(tmp_path, "--resolution", 16)
    assert [samples[0, i]["pixel_values"].unique().tolist() for i in range(2)] == [[-1.0], [1.0]]


@pytest.mark.parametrize(
    "size, resized", [((4, 6), (8, 12)), ((7, 10), (8, 11)), ((9, 8), (9, 8)), ((1, 30), (8, 240))]
)
def test_shorter_side_becomes_resolution(tmp_path, size, resized):
    """Small and odd sizes are scaled until the shorter side is the resolution, and cropped in the middle."""
    samples = samples_of(ramp(tmp_path / "x", *size), "--resolution", 8, "--center_crop")
    image = Image.open(tmp_path / "x" / "a.png").resize(resized, Image.Resampling.LANCZOS)
    left, top = ((length - 7) // 2 for length in resized)
    expected = np.asarray(image.crop((left, top, left + 8, top + 8)))[:, :, 0]
    assert greys(samples).tolist() == expected.tolist()


def smooth(folder, width, height):
    """Saves a picture of soft colours, with a caption."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(folder / "a.png")
    (folder / "a.txt").write_text("soft")
    return folder


@pytest.mark.parametrize("mode", ["lanczos", "bicubic", "bilinear", "hamming", "box", "nearest"])
@pytest.mark.parametrize("size", [(201, 90), (57, 130), (19, 40)])
def test_a_crop_is_that_of_the_whole_picture(tmp_path, mode, size):
    """Resizing what will be cropped gives what resizing all and cropping then gives, but for rounding."""
    samples = samples_of(smooth(tmp_path / "x", *size), "--resolution", 32, "--image_interpolation_mode", mode)
    image = Image.open(tmp_path / "x" / "a.png")
    for epoch in range(20):
        crop = samples.choose_crop((epoch, 0))
        whole = image.resize((crop.width, crop.height), Image.Resampling[mode.upper()])
        whole = whole.crop((crop.left, crop.top, crop.left + 32, crop.top + 32))
        apart = (samples.pixels(crop).permute(1, 2, 0).numpy() + 1) * 127.5 - np.asarray(whole, dtype=np.float32)
        # At a tie, the last two take one neighbour or the other.
        assert (np.abs(apart) > 2.01).mean() <= (0.05 if mode in ("box", "nearest") else 0)


@linux
def test_a_thin_picture_takes_little_memory(tmp_path):
    """Of 4000 x 1 pixels, no more than the crop is resized: as a whole they would take 4 GiB at 512."""
    samples = samples_of(ramp(tmp_path / "x", 4000, 1), "--resolution", 512)
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        assert pool.submit(growth, samples).result(timeout=60) < 100


def growth(samples):
    """By how many MiB the memory of this process grows at most for a sample."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert samples.pixels(samples.choose_crop((0, 0))).shape == (3, 512, 512)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def test_random_crop(tmp_path):
    """Random crops lie in the picture, and each of the nine places of a 16 x 8 picture comes up about as often."""
    samples = samples_of(ramp(tmp_path / "x", 16, 8), "--resolution", 8)
    rows = [greys(samples, (epoch, 0)) for epoch in range(450)]
    lefts = [int(row[0, 0]) // 8 for row in rows]
    assert all(row[:, 0].tolist() == [8 * left] * 8 for row, left in zip(rows, lefts))
    assert all(row[0].tolist() == [8 * (left + x) for x in range(8)] for row, left in zip(rows, lefts))
    counts = [lefts.count(left) for left in range(9)]
    assert min(counts) > 33 and sum(counts) == 450
    tall = samples_of(ramp(tmp_path / "y", 8, 16, "rows"), "--resolution", 8)
    assert len({int(greys(tall, (epoch, 0))[0, 0]) for epoch in range(100)}) == 9


def test_random_flip(tmp_path):
    """About half of the samples are mirrored, and no crop changes by the flag."""
    plain = samples_of(ramp(tmp_path / "x", 16, 8), "--resolution", 8)
    flipping = samples_of(tmp_path / "x", "--resolution", 8, "--random_flip")
    flipped = 0
    for epoch in range(200):
        before, after = greys(plain, (epoch, 0)), greys(flipping, (epoch, 0))
        assert torch.equal(after, before) or torch.equal(after, before.flip(1))
        flipped += torch.equal(after, before.flip(1))
    assert 70 < flipped < 130


@pytest.mark.parametrize("mode", ["lanczos", "bicubic", "bilinear", "box", "hamming", "nearest", "nearest_exact"])
def test_interpolation(pictures, mode):
    """Each filter is the one of its name."""
    samples = samples_of(pictures, "--resolution", 16, "--image_interpolation_mode", mode)
    with Image.open(pictures / "000.png") as image:
        filters = {
            name.lower(): image.resize((16, 16), number) for name, number in Image.Resampling.__members__.items()
        }
    expected = np.asarray(filters[mode.removesuffix("_exact")]) / np.float32(127.5) - 1
    assert np.allclose(samples[0, 0]["pixel_values"].permute(1, 2, 0), expected, atol=1e-6)
    assert len({image.tobytes() for image in filters.values()}) == len(filters) >= 6


def test_caption_list(tmp_path):
    """Each caption of a list is drawn about as often, anew in every epoch."""
    make_picture(tmp_path / "a.png")
    write_metadata(tmp_path, {"file_name": "a.png", "text": ["one", "two", "three"]})
    samples = samples_of(tmp_path, "--resolution", 8)
    drawn = [samples[epoch, 0]["caption"] for epoch in range(300)]
    assert {*drawn} == {"one", "two", "three"} and min(map(drawn.count, {*drawn})) > 70


@pytest.mark.parametrize("fraction, low, high", [(0.0, 0, 0), (0.25, 50, 100), (1.0, 300, 300)])
def test_empty_prompts(tmp_path, fraction, low, high):
    """The captions are dropped for this fraction of the samples."""
    make_picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one")
    samples = samples_of(tmp_path, "--resolution", 8, "--proportion_empty_prompts", fraction)
    drawn = [samples[epoch, 0]["caption"] for epoch in range(300)]
    assert low <= drawn.count("") <= high and drawn.count("") + drawn.count("one") == 300


# What is drawn.


def drawn_of(folder, *flags, seed=1):
    """The samples of a folder's pictures with two captions each."""
    return samples_of(folder, "--resolution", 32, "--center_crop", *flags, seed=seed, twice=True)


# Flags that have a sample draw all the noises that there are.
NOISY = ("--noise_offset", 0.1, "--input_perturbation", 0.1)


def equal(first, second):
    """Whether two samples hold the same values under the same names."""
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def test_a_sample_is_its_keys(wide_pictures):
    """A sample is a function of seed and key: not of what was drawn before, nor of its batch-mates or the worker."""
    flags = ("--random_flip", "--no-center_crop", "--proportion_empty_prompts", 0.3, *NOISY)
    samples, keys = drawn_of(wide_pictures, *flags), [(epoch, index) for epoch in range(4) for index in range(5)]
    alone = {key: samples[key] for key in keys}
    fresh = drawn_of(wide_pictures, *flags)
    assert all(equal(fresh[key], alone[key]) for key in reversed(keys))
    loader = torch.utils.data.DataLoader(samples, batch_sampler=[keys[3:14:5], keys[::-1]], num_workers=1)
    for batch, names in zip(loader, (keys[3:14:5], keys[::-1])):
        for i, key in enumerate(names):
            assert equal({name: values[i] for name, values in batch.items()}, alone[key])
    # Every draw differs between keys, between seeds, and from the sample's other draws.
    other = drawn_of(wide_pictures, *flags, seed=2)
    for name in ("noise", "perturbation", "posterior_noise", "offset_noise"):
        drawn = {sample[name].tobytes() for sample in (*alone.values(), *(other[key] for key in keys))}
        assert len(drawn) == 40, name
    assert len({sample["timesteps"] for sample in alone.values()}) > 15
    assert len({alone[0, 0][name].tobytes() for name in ("noise", "perturbation", "posterior_noise")}) == 3


def test_a_flag_that_is_off_shifts_nothing(wide_pictures):
    """What a flag turns off is not drawn; what it turns on changes its own part of a sample, and no other draw."""
    keys = [(epoch, index) for epoch in range(6) for index in range(5)]
    plain = {key: drawn_of(wide_pictures)[key] for key in keys}
    changed = {
        ("--random_flip",): {"pixel_values"},
        ("--no-center_crop",): {"pixel_values", "time_ids"},
        ("--proportion_empty_prompts", 0.5): {"caption"},
        NOISY: set(),
    }
    parts = {"caption", "input_ids", "time_ids", "pixel_values", "posterior_noise", "noise", "timesteps"}
    assert {*plain[0, 0]} == parts
    assert {*drawn_of(wide_pictures, *NOISY)[0, 0]} == {*plain[0, 0], "offset_noise", "perturbation"}
    for flags, names in changed.items():
        bent = {key: drawn_of(wide_pictures, *flags)[key] for key in keys}
        differing = {
            name for key in keys for name in plain[key] if not np.array_equal(bent[key][name], plain[key][name])
        }
        assert differing == names, flags
    flipped, dropped = ({key: drawn_of(wide_pictures, *flags)[key] for key in keys} for flags in list(changed)[::2])
    mirrored = [key for key in keys if not np.array_equal(flipped[key]["pixel_values"], plain[key]["pixel_values"])]
    assert all(torch.equal(flipped[key]["pixel_values"].flip(2), plain[key]["pixel_values"]) for key in mirrored)
    assert 8 <= len(mirrored) <= 22
    empty = [key for key in keys if dropped[key]["caption"] == ""]
    assert 8 <= len(empty) <= 22 and set(empty) != set(mirrored)
    assert all(dropped[key]["caption"] == plain[key]["caption"] for key in keys if key not in empty)
    assert {plain[key]["caption"].startswith("again") for key in keys} == {True, False}


def test_draws_are_distributed_as_they_should_be(wide_pictures):
    """Noises are normal and timesteps uniform over all of the schedule, first and last included."""
    samples = drawn_of(wide_pictures, *NOISY)
    drawn = [samples[epoch, index] for epoch in range(100) for index in range(5)]
    for name in ("noise", "perturbation", "posterior_noise", "offset_noise"):
        values = np.stack([sample[name] for sample in drawn])
        assert values.dtype == np.float32
        assert max(abs(values.mean()), abs(values.std() - 1)) < 4 / math.sqrt(values.size), name
    timesteps = np.array([sample["timesteps"] for sample in drawn])
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    assert (np.histogram(timesteps, bins=10, range=(0, 1000))[0] > 25).all()
    short = drawn_of(wide_pictures)
    short.num_train_timesteps = 2
    assert {int(short[epoch, 0]["timesteps"]) for epoch in range(20)} == {0, 1}


def test_each_draw_has_a_stream_of_its_own(wide_pictures):
    """A draw's numbers are those of default_rng((seed, epoch, index, crc32 of its name)), and of nothing else."""
    samples = drawn_of(wide_pictures, *NOISY, "--no-center_crop", "--random_flip", "--proportion_empty_prompts", 0.5)
    asked = []
    for key in [(epoch, index) for epoch in range(5) for index in range(5)]:
        names = set()
        samples.rng = lambda key, name, names=names: names.add(name) or script.Samples.rng(samples, key, name)
        sample = samples[key]

        def stream(name, key=key):
            return np.random.default_rng((1, *key, zlib.crc32(name.encode())))

        for name in ("noise", "perturbation"):
            assert np.array_equal(sample[name], stream(name).standard_normal((4, 16, 16), dtype=np.float32))
        assert sample["timesteps"] == stream("timestep").integers(1000)
        assert (sample["caption"] == "") == (stream("empty caption").random() < 0.5)
        asked.append(names)
    every = {"crop", "flip", "empty caption", "posterior", "noise", "timestep", "offset noise", "perturbation"}
    assert asked[0] - {"caption"} == every and set.union(*asked) == every | {"caption"}
    plain = drawn_of(wide_pictures)
    plain.rng = lambda key, name: asked.append({name}) or script.Samples.rng(plain, key, name)
    asked.clear()
    plain[0, 0]
    assert set.union(*asked) == {"caption", "posterior", "noise", "timestep"}


@pytest.mark.parametrize("total, size", [(2, 5), (4, 5), (5, 5), (16, 5), (3, 1), (1, 7)])
def test_step_keys(total, size):
    """Steps take total_batch_size keys each from permutations that follow each other without a gap or a repeat."""
    steps = [script.step_keys(step, total_batch_size=total, sizes=(size, 0), seed=1) for step in range(3 * size)]
    assert all(len(keys) == total for keys in steps)
    stream = [key for keys in steps for key in keys]
    epochs = [stream[i : i + size] for i in range(0, len(stream), size)]
    assert len(epochs) == 3 * total
    for epoch, keys in enumerate(epochs):
        assert sorted(keys) == [(epoch, index) for index in range(size)]
    # The stream does not know how it is cut into steps, and so not on how many processes it is consumed.
    assert stream == [script.step_keys(i, 1, (size, 0), 1)[0] for i in range(len(stream))]
    if size >= 5:
        assert len({tuple(index for _, index in keys) for keys in epochs}) > 1
        assert stream != [key for i in range(3 * size) for key in script.step_keys(i, total, (size, 0), 2)]


@pytest.mark.parametrize("size, accumulation", [(7, 1), (2, 2)])
def test_batches_are_whole(train, five_pictures, monkeypatch, size, accumulation):
    """Five pictures feed batches of seven, or two batches of two a step: whole, and each as often."""
    batches = watch(monkeypatch, script).batches
    flags = ("--train_batch_size", size, "--gradient_accumulation_steps", accumulation, "--max_train_steps", 5)
    out = train("out", "--train_data_dir", five_pictures, *flags)
    assert [len(batch["timesteps"]) for batch in batches] == [size] * 5 * accumulation
    counts = Counter(caption for batch in batches for caption in batch["caption"])
    assert [*counts.values()] == [size * accumulation] * 5
    assert len(metrics(out, "loss")) == 5
