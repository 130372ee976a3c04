"""Pictures and captions: where they come from, what a sample makes of them, what is refused, what is cached."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, make_pictures, metrics, run, same, weights
from PIL import Image
from safetensors.torch import load_file, save_file

import train_text_to_image as script


FAST = ["--resolution", 16, "--train_batch_size", 1, "--max_train_steps", 3, "--lr_warmup_steps", 0, "--seed", 1]
FAST += ["--report_to", "none"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is known of other tests' pictures."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def train(tiny_model, tmp_path):
    """Trains a little on a folder or data set; returns the output folder."""

    def train(data, *flags, output="out", base=tiny_model):
        source = ["--train_data_dir" if isinstance(data, Path) else "--dataset_name", data]
        base = ["--pretrained_model_name_or_path", base, "--output_dir", tmp_path / output]
        run(script, *FAST, *base, *source, *flags)
        return tmp_path / output

    return train


@pytest.fixture
def check(train, monkeypatch):
    """Trains up to where the models would be loaded; returns what was said if it ended before."""
    reached = SystemExit("reached the models")

    def load_models(*args):
        raise reached

    def check(data, *flags):
        monkeypatch.setattr(script, "load_models", load_models)
        with pytest.raises(SystemExit) as end:
            train(data, *flags)
        return None if end.value.code == reached.code else end.value.code

    return check


@pytest.fixture
def used(monkeypatch):
    """The Samples that runs make: the pictures to train on, those held out, and again for the next run."""
    made = []

    class Recorder(script.Samples):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(script, "Samples", Recorder)
    return made


def names_of(samples):
    """The names of the pictures that Samples are made of."""
    return [Path(record["name"]).stem for record in samples.records]


def parse(data, *flags):
    """The arguments of a run on a folder."""
    return script.parse_args(
        ["--pretrained_model_name_or_path", "a/b", "--train_data_dir", str(data), *map(str, flags)]
    )


def captions_of(folder, *flags):
    """The captions of a folder's pictures by their names in it, in the order in which they are read."""
    records = script.read_records(parse(folder, *flags))
    return {Path(record["name"]).relative_to(folder).as_posix(): record["captions"] for record in records}


def samples_of(folder, *flags):
    """The samples of a folder's pictures, as a run makes them."""
    args = parse(folder, *flags)
    records = []
    for record in script.read_records(args):
        size = script.open_image(Path(record["name"]).read_bytes()).size
        records.append({**record, "digest": "", "size": size})
    return script.Samples(args, records, 0, (4, 8, 8), 1000)


def make_picture(path, size=(16, 16), colour="red", **settings):
    """Saves a picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **settings)
    return path


def write_metadata(folder, *rows):
    """Writes metadata.jsonl, a row a line."""
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def state_of(folder):
    """All there is to know of a folder's files."""
    files = sorted(folder.rglob("*"))
    return {f: (f.stat().st_mtime_ns, f.stat().st_mode, f.is_file() and f.read_bytes()) for f in files}


# Where pictures and captions come from.


def test_folder_of_every_kind(tmp_path):
    """Metadata as JSON lines and as CSV, .txt files, subfolders, lists, Unicode and upper-case suffixes are read."""
    for name in ("b.PNG", "a.jpg", "sub/c.webp", "sub/deep/d.Jpeg", "table/e.bmp", "table/ü.tiff", "z.gif"):
        make_picture(tmp_path / name)
    rows = [{"file_name": "b.PNG", "text": "plain"}, {"file_name": "sub/c.webp", "text": [" one", "two "]}]
    write_metadata(tmp_path, *rows)
    (tmp_path / "a.txt").write_text(" beside\n")
    (tmp_path / "z.txt").write_text("日本語 🦊", encoding="utf-8")
    (tmp_path / "sub" / "deep" / "metadata.jsonl").write_text('{"file_name": "d.Jpeg", "text": "caf\\u00e9"}')
    with open(tmp_path / "table" / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_name", "text"), ("e.bmp", 'commas, "quotes"'), ("ü.tiff", "größer")])
    (tmp_path / "notes.md").write_text("not a picture")
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "._a.jpg").write_bytes(b"as macOS leaves it")
    expected = {
        "a.jpg": ["beside"],
        "b.PNG": ["plain"],
        "sub/c.webp": ["one", "two"],
        "sub/deep/d.Jpeg": ["café"],
        "table/e.bmp": ['commas, "quotes"'],
        "table/ü.tiff": ["größer"],
        "z.gif": ["日本語 🦊"],
    }
    assert captions_of(tmp_path) == expected
    assert [*captions_of(tmp_path)] == [*expected]


def test_caption_column(tmp_path):
    """--caption_column names the captions of a folder's metadata, whatever other columns there are."""
    make_picture(tmp_path / "a.png")
    write_metadata(tmp_path, {"text": "no", "file_name": "a.png", "caption": "yes", "width": 16})
    assert captions_of(tmp_path, "--caption_column", "caption") == {"a.png": ["yes"]}


@pytest.mark.parametrize(
    "text", ['\n{"file_name": "a.png", "text": "x"}\n\n  \n', '{"file_name": "a.png", "text": "x"}']
)
def test_blank_lines(tmp_path, text):
    """Blank lines in metadata.jsonl, or no newline at its end, change nothing."""
    make_picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(text)
    assert captions_of(tmp_path) == {"a.png": ["x"]}


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "a.txt"])
def test_byte_order_mark(tmp_path, name):
    """The mark that Windows programs put before UTF-8 is no part of the text."""
    make_picture(tmp_path / "a.png")
    text = {"metadata.csv": "file_name,text\na.png,x\n", "metadata.jsonl": '{"file_name": "a.png", "text": "x"}\n'}
    (tmp_path / name).write_text(text.get(name, "x"), encoding="utf-8-sig")
    assert captions_of(tmp_path) == {"a.png": ["x"]}


def test_order_is_sorted(tmp_path, monkeypatch):
    """The order of the pictures is that of their names, however the metadata and the file system order them."""
    names = ["10.png", "2.png", "a/1.png", "b.png", "B.png"]
    for name in reversed(names):
        make_picture(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    write_metadata(tmp_path, *({"file_name": name, "text": name} for name in ("b.png", "2.png")))
    forwards = captions_of(tmp_path)
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: sorted(rglob(self, pattern), reverse=True))
    assert list(captions_of(tmp_path).items()) == list(forwards.items())
    assert [*forwards] == sorted(names)


def test_same_from_folder_parquet_and_hub(train, hub, pictures, tiny_model, tmp_path):
    """The same pictures give the same losses from a folder, from parquet files and from the Hub, as does the base."""
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    table = {"pic": [str(pictures / row["file_name"]) for row in rows], "words": [row["text"] for row in rows]}
    table = datasets.Dataset.from_dict(table).cast_column("pic", datasets.Image())
    parquet = tmp_path / "parquet"
    parquet.mkdir()
    for name, part in (("b", range(4, 6)), ("a", range(4))):  # written in another order than they are read
        table.select(part).to_parquet(parquet / f"{name}.parquet")
    hub.add_folder("datasets/me/pictures", pictures)
    hub.add_folder("datasets/me/parquet", parquet)
    hub.add_folder("me/model", tiny_model)
    columns = ["--image_column", "pic", "--caption_column", "words"]
    losses = [
        metrics(train(pictures, output="folder"), "loss"),
        metrics(train(parquet, *columns, output="local"), "loss"),
        metrics(train("me/pictures", "--cache_dir", tmp_path / "downloads", output="hub"), "loss"),
        metrics(train("me/parquet", *columns, output="hub-parquet"), "loss"),
        metrics(train(pictures, output="base", base="me/model"), "loss"),
    ]
    assert len(losses[0]) == 3 and all(other == losses[0] for other in losses)
    assert any(file.is_file() for file in (tmp_path / "downloads").rglob("*"))


def test_revision_is_of_every_part(train, hub, tiny_model, tiny_v_model, tmp_path):
    """--revision is that of all parts, scheduler and tokenizer too; --non_ema_revision is the UNet's."""
    old = shutil.copytree(tiny_v_model, tmp_path / "old")
    for part in ("vae", "text_encoder", "unet"):
        scale_weight(old, part)
    tokenizer = old / "tokenizer" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"model_max_length": 70}))
    hub.add_folder("me/model", tiny_model)
    hub.add_folder("me/model@old", old)
    data = make_pictures(tmp_path / "pictures")
    for flags, source in ((["--revision", "old"], old), ([], tiny_model)):
        out = train(data, *flags, "--learning_rate", 0, base="me/model", output=f"of-{source.name}")
        for part in ("vae", "text_encoder", "unet"):
            assert same(weights(out / part), weights(source / part)), part
        for name in ("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"):
            values = [json.loads((folder / name).read_text()) for folder in (out, source)]
            keys = ("prediction_type", "model_max_length")
            assert [values[0].get(key) for key in keys] == [values[1].get(key) for key in keys], name
    flags = ["--non_ema_revision", "old", "--learning_rate", 0]
    out = train(data, *flags, base="me/model", output="mixed")
    assert same(weights(out / "unet"), weights(old / "unet")) and same(
        weights(out / "vae"), weights(tiny_model / "vae")
    )


@pytest.mark.launch
def test_offline(hub, tiny_model, pictures, tmp_path):
    """With HF_HUB_OFFLINE=1, what `hf download` fetched trains by its Hub id, and the Hub is not asked."""
    hub.add_folder("me/model", tiny_model)
    settings = {"check": True, "capture_output": True, "text": True, "timeout": 120}
    online, hf = {**hub.env, "HF_HOME": str(tmp_path / "shared")}, Path(sys.executable).parent / "hf"
    parts = ["--include", "*.json", "--include", "*.txt", "--include", "*/*.safetensors"]  # as docs/cluster.md says
    subprocess.run([hf, "download", "me/model", *parts], env=online, **settings)
    asked = len(hub.requests)
    assert asked > 5
    flags = [*FAST, "--pretrained_model_name_or_path", "me/model", "--train_data_dir", pictures]
    flags += ["--output_dir", tmp_path / "out", "--validation_prompts", "a"]
    command = [sys.executable, ROOT / "train_text_to_image.py", *flags]
    subprocess.run([str(word) for word in command], env=online | {"HF_HUB_OFFLINE": "1"}, **settings)
    assert len(hub.requests) == asked and len(metrics(tmp_path / "out", "loss")) == 3


def test_captions_of_rows(tmp_path):
    """A column of lists of captions is read from parquet, and a row without a caption has none."""
    image = make_picture(tmp_path / "a.png")
    data = {"image": [str(image)] * 3, "text": [["one", "two"], [], None]}
    table = datasets.Dataset.from_dict(data).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "data.parquet")
    assert [r["captions"] for r in script.read_records(parse(tmp_path))] == [["one", "two"], [], []]


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


def test_exif_rotation(train, used, tmp_path):
    """Pictures that their camera held sideways, here red left and blue right, are trained on upright."""
    expected = {}
    for orientation, size, red in (
        (1, (16, 8), "left"),
        (3, (16, 8), "right"),
        (6, (8, 16), "top"),
        (8, (8, 16), "bottom"),
    ):
        for kind in ("PNG", "JPEG"):
            image = Image.new("RGB", (16, 8), "red")
            image.paste("blue", (8, 0, 16, 8))
            exif = Image.Exif()
            exif[0x0112] = orientation
            path = tmp_path / "pictures" / f"{orientation}.{kind.lower()}"
            path.parent.mkdir(exist_ok=True)
            image.save(path, kind, exif=exif)
            path.with_suffix(".txt").write_text("x")
            expected[path.name] = (size, red)
    train(tmp_path / "pictures", "--center_crop", "--resolution", 8, "--max_train_steps", 1)
    samples = used[0]
    for i, record in enumerate(samples.records):
        size, red = expected[Path(record["name"]).name]
        pixels = samples.pixels(samples.place((0, i))[1])
        halves = {"left": pixels[:, :, :3], "right": pixels[:, :, 5:], "top": pixels[:, :3], "bottom": pixels[:, 5:]}
        assert tuple(record["size"]) == size
        assert [name for name, half in halves.items() if half[0].min() > 0.9 and half[2].max() < -0.9] == [red]


# What is refused.


def spoil(folder):
    """Adds every kind of bad picture to a folder; returns what is to be said of each, by name."""
    whole = make_picture(folder / "truncated.jpg", (64, 64)).read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) - 60])
    png = make_picture(folder / "sub" / "cut.png", (64, 64)).read_bytes()
    (folder / "sub" / "cut.png").write_bytes(png[: len(png) // 2])
    (folder / "text.png").write_text("<html>404</html>")
    (folder / "zero.webp").write_bytes(b"")
    make_picture(folder / "no caption.png")
    make_picture(folder / "blank caption.png")
    make_picture(folder / "null caption.png")
    make_picture(folder / "blank txt.png")
    (folder / "blank txt.txt").write_text(" \n")
    for name in ("truncated", "sub/cut", "text", "zero"):
        (folder / f"{name}.txt").write_text("a caption")
    with open(folder / "metadata.jsonl", "a") as file:
        for name, text in (("gone.png", "x"), ("blank caption.png", "  "), ("null caption.png", None)):
            file.write(json.dumps({"file_name": name, "text": text}) + "\n")
    return {
        "blank caption.png": "has no caption",
        "blank txt.png": "has no caption",
        "gone.png": "is not there",
        "no caption.png": "has no caption",
        "null caption.png": "has no caption",
        "sub/cut.png": "cannot be decoded",
        "text.png": "is not a picture",
        "truncated.jpg": "cannot be decoded",
        "zero.webp": "is empty",
    }


def test_all_bad_pictures_are_listed(check, tmp_path):
    """Every unusable picture is named with what is wrong in one message, before any model is loaded."""
    folder = make_pictures(tmp_path / "pictures")
    expected = spoil(folder)
    before = state_of(folder)
    title, *lines = check(folder).split("\n")
    assert title == f"{len(expected)} of {6 + len(expected)} pictures cannot be used:"
    for line, (name, problem) in zip(lines, expected.items()):
        assert line.startswith(f"  {folder / name} ") and problem in line
    assert len(lines) == len(expected) + 1 and "--on_bad_image skip" in lines[-1]
    assert state_of(folder) == before
    assert "9 of 15" in check(folder)  # nor does it pass the second time, when the good ones are known


def test_skipped_as_if_not_there(train, tmp_path, capsys):
    """--on_bad_image skip lists the bad pictures and trains as if they were not there, changing none of the files."""
    folder = make_pictures(tmp_path / "pictures")
    clean = metrics(train(folder, output="clean"), "loss")
    bad = spoil(folder)
    before = state_of(folder)
    capsys.readouterr()
    output = train(folder, "--on_bad_image", "skip", output="skipped")
    said = capsys.readouterr().out
    assert all(f"{folder / name} " in said for name in bad) and "pictures   6 to train on" in said
    assert metrics(output, "loss") == clean and len(clean) == 3
    assert same(weights(output / "unet"), weights(tmp_path / "clean" / "unet"))
    assert state_of(folder) == before


def test_skip_leaves_something(check, tmp_path):
    """When all pictures are bad, skipping is no way out."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_text("no")
    assert "1 of 1 pictures" in check(tmp_path / "pictures", "--on_bad_image", "skip")


def test_bad_rows_are_listed(check, tmp_path):
    """Bad pictures of a data set are listed by row."""
    good = make_picture(tmp_path / "good.png").read_bytes()
    image = [{"bytes": data, "path": None} for data in (good, good[:40], b"", good, b"<html>")]
    table = datasets.Dataset.from_dict({"image": image, "text": ["x", "x", "x", "", "x"]})
    (tmp_path / "rows").mkdir()
    table.to_parquet(tmp_path / "rows" / "data.parquet")
    title, *lines = check(tmp_path / "rows").split("\n")
    assert title.startswith("4 of 5 ") and [line.split()[:2] for line in lines[:4]] == [
        ["row", f"{i}"] for i in (1, 2, 3, 4)
    ]


def test_picture_without_bytes(check, tmp_path):
    """A row whose picture is null is bad as any other."""
    good = {"bytes": make_picture(tmp_path / "good.png").read_bytes(), "path": None}
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_dict({"image": [good, None], "text": ["x", "x"]}).to_parquet(tmp_path / "rows" / "a.parquet")
    assert "row 1 " in check(tmp_path / "rows")


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("metadata.jsonl", '{"file_name": "000.png", "caption": "x"}\n', "'text', but ['file_name', 'caption']"),
        ("metadata.jsonl", '{"image": "000.png", "text": "x"}\n', "'file_name', but ['image', 'text']"),
        ("metadata.csv", "file_name,caption\n000.png,x\n", "'text', but ['file_name', 'caption']"),
        ("metadata.jsonl", '{"file_name": "000.png", "text": "x"}\n{"file_name": "001.png", "te', "cannot be read"),
        ("metadata.jsonl", '["000.png", "x"]\n', ""),
        ("metadata.jsonl", '{"file_name": null, "text": "x"}\n', ""),
        ("metadata.csv", "file_name,text\n000.png\n", None),
        ("metadata.csv", "file_name,text\n000.png,x,y\n", None),
        ("metadata.csv", 'file_name,text\n000.png,"' + "x" * 200_000 + '"\n', ""),
        ("metadata.jsonl", '{"file_name": "000.png", "text": "caf\xe9"}\n', "cannot be read"),
        ("000.txt", "caf\xe9", ""),
    ],
)
def test_broken_metadata(check, tmp_path, name, text, says):
    """A metadata or caption file that cannot be understood is named, with the columns it has."""
    for i in range(2):
        make_picture(tmp_path / "pictures" / f"{i:03d}.png")
        (tmp_path / "pictures" / f"{i:03d}.txt").write_text("x")
    (tmp_path / "pictures" / name).write_text(text, encoding="latin-1")
    message = check(tmp_path / "pictures")
    if says is None:
        assert message is None
    else:
        where = (tmp_path / "pictures" / name).with_suffix("" if name.endswith(".txt") else Path(name).suffix)
        assert str(where) in message and says in message


def test_captionless_row_is_listed(check, tmp_path):
    """One line of metadata.jsonl without a caption is one bad picture, not a wrong column."""
    folder = make_pictures(tmp_path / "pictures")
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "x.png"}\n')
    make_picture(folder / "x.png")
    assert "1 of 7 pictures" in check(folder)


def test_empty_folder(check, tmp_path):
    """A folder without pictures is refused by its name."""
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "empty" / "notes.txt").write_text("nothing")
    message = check(tmp_path / "empty")
    assert str(tmp_path / "empty") in message and "no pictures" in message and ".png" in message


@pytest.mark.parametrize("column", ["image", "caption"])
def test_unknown_column(check, hub, pictures, column):
    """A column that a Hub data set does not have is refused by name, with the columns that there are."""
    hub.add_folder("datasets/me/pictures", pictures)
    message = check("me/pictures", f"--{column}_column", "nonsense")
    assert f"--{column}_column nonsense" in message and "image, text" in message


def test_unknown_dataset(check, hub):
    """A data set that the Hub does not have is refused by name."""
    assert "me/nothing" in check("me/nothing")


@pytest.mark.parametrize("flags", [["--validation_samples", 6], ["--validation_samples", 2, "--max_train_samples", 2]])
def test_nothing_left_to_train_on(check, pictures, flags):
    """Holding out all the pictures there are is refused before any model loads."""
    assert f"--validation_samples {flags[1]} " in check(pictures, *flags)


# How many there are.


ALL = ["000", "001", "002", "003", "004", "005"]


def test_max_train_samples(train, pictures, used, capsys):
    """So many pictures are drawn, by the seed, in their order; more than there are means all of them."""
    train(pictures, "--max_train_samples", 100, "--max_train_steps", 1, output="all")
    assert [names_of(samples) for samples in used] == [ALL, []]
    draws = []
    for seed in range(4):
        flags = ["--max_train_samples", 3, "--seed", seed, "--max_train_steps", 1]
        used.clear()
        capsys.readouterr()
        train(pictures, *flags, output=f"seed-{seed}")
        assert "pictures   3 to train on, 0 held out" in capsys.readouterr().out
        draws.append(names_of(used[0]))
        assert len(draws[-1]) == 3 and draws[-1] == sorted({*draws[-1]} & {*ALL})
    assert len({*map(tuple, draws)}) > 1
    train(pictures, *flags, output="again")
    assert names_of(used[-2]) == draws[-1]


def test_validation_samples(train, pictures, used):
    """Held-out pictures are not trained on, nor drawn by the seed."""
    for seed in (1, 2):
        train(pictures, "--validation_samples", 2, "--seed", seed, "--max_train_steps", 1, output=f"seed-{seed}")
    trained, held_out, *again = map(names_of, used)
    assert len(held_out) == 2 and sorted(trained + held_out) == ALL
    assert again == [trained, held_out]


# How often pictures are decoded.


def test_unchanged_pictures_are_not_decoded_again(check, tmp_path, monkeypatch):
    """A second run decodes only pictures that are new or changed, and still misses captions that are gone."""
    folder = make_pictures(tmp_path / "pictures")
    opened = []
    open_image = script.open_image
    monkeypatch.setattr(script, "open_image", lambda data: opened.append(1) or open_image(data))

    def count():
        opened.clear()
        assert check(folder) is None
        return len(opened)

    assert (count(), count()) == (6, 0)
    make_picture(folder / "001.png", colour="pink")
    assert (count(), count()) == (1, 0)
    os.utime(folder / "000.png", (1, 1))
    assert count() == 1
    make_picture(folder / "006.png")
    (folder / "006.txt").write_text("one more")
    (folder / "metadata.jsonl").write_text((folder / "metadata.jsonl").read_text().replace("a red", "a pink"))
    assert count() == 1
    times = (folder / "002.jpg").stat()
    (folder / "002.jpg").write_bytes((folder / "002.jpg").read_bytes()[:300])
    os.utime(folder / "002.jpg", ns=(times.st_atime_ns, times.st_mtime_ns))
    (folder / "006.txt").unlink()
    assert check(folder).startswith("2 of 7 ") and check(folder).startswith("2 of 7 ")


def test_unchanged_rows_are_not_decoded_again(check, tmp_path, monkeypatch):
    """Nor does a second run decode the rows of a data set again."""
    image = make_picture(tmp_path / "a.png")
    table = datasets.Dataset.from_dict({"image": [str(image)] * 2, "text": ["x", "y"]})
    (tmp_path / "rows").mkdir()
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "rows" / "data.parquet")
    assert check(tmp_path / "rows") is None
    monkeypatch.setattr(script, "open_image", lambda data: 1 / 0)
    assert check(tmp_path / "rows") is None


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
    side = samples.args.resolution
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


# The cache of latents and embeddings.


def entries(cache):
    """The names of a cache's entries: latents and prompts."""
    return [{file.name for file in (cache / kind).glob("*")} for kind in ("latents", "prompts")]


def scale_weight(folder, part):
    """Scales one tensor of a part of a model."""
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].numel())
    save_file({**tensors, name: tensors[name] * 1.1}, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """Two pictures that are a pixel wider than high at a resolution of 16, with captions, and the cache of a run."""
    folder = tmp_path_factory.mktemp("made")
    for name, colour in (("a", "red"), ("b", "blue")):
        make_picture(folder / "two" / f"{name}.png", (17, 16), colour)
        (folder / "two" / f"{name}.txt").write_text(name)
    paths = ["--pretrained_model_name_or_path", tiny_model, "--train_data_dir", folder / "two"]
    paths += ["--output_dir", folder / "out", "--encoding_cache_dir", folder / "cache"]
    run(script, *FAST, *paths, "--max_train_steps", 4, "--center_crop")
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
        ("precision", 2, 2),
    ],
)
def test_cache_key(train, two, tiny_model, tmp_path, change, new_latents, new_prompts):
    """An entry is made anew when what it depends on changes, and only then."""
    cache, base, flags = tmp_path / "cache", tiny_model, ["--center_crop"]
    settings = ["--encoding_cache_dir", cache, "--max_train_steps", 16]
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
    train(two, *settings, *flags, base=base)
    assert [len(now - then) for now, then in zip(entries(cache), before)] == [new_latents, new_prompts]
    assert all(then <= now for now, then in zip(entries(cache), before))


def test_cache_folder(train, two, tmp_path, capsys):
    """Entries are kept under XDG_CACHE_HOME, or where --encoding_cache_dir says, and the header names the place."""
    flags = ["--center_crop", "--max_train_steps", 4]
    train(two, *flags, output="first")
    default = tmp_path / "xdg" / "diffusion-training"
    assert entries(default) == entries(tmp_path / "cache")
    assert f"GiB in {default}" in capsys.readouterr().out
    before = state_of(default)
    train(two, *flags, "--encoding_cache_dir", tmp_path / "moved" / "deep", output="second")
    assert entries(tmp_path / "moved" / "deep") == entries(default)
    assert state_of(default) == before
    assert f"GiB in {tmp_path / 'moved' / 'deep'}" in capsys.readouterr().out


def test_no_encoding_cache(train, two, tmp_path, capsys):
    """--no_encoding_cache reads and leaves nothing anywhere but the result."""
    before = state_of(tmp_path)
    train(two, "--center_crop", "--no_encoding_cache", "--encoding_cache_dir", tmp_path / "cache")
    shutil.rmtree(tmp_path / "out")
    assert state_of(tmp_path) == before
    assert "cache      off" in capsys.readouterr().out


def test_torn_cache(train, two, tmp_path):
    """Entries that were torn are made again, with the same bytes, and no half-written file stays."""
    cache = tmp_path / "cache"
    flags = ["--center_crop", "--max_train_steps", 4, "--encoding_cache_dir", cache]
    files = [file for kind in ("latents", "prompts") for file in sorted((cache / kind).iterdir())]
    whole = [file.read_bytes() for file in files]
    for file, size in zip(files, (0, 5, 60, -1)):
        file.write_bytes(file.read_bytes()[:size])
    for manifest in (cache / "checked").iterdir():
        manifest.write_text('{"torn')
    train(two, *flags)
    assert [file.read_bytes() for file in files] == whole
    assert {file for kind in ("latents", "prompts") for file in (cache / kind).iterdir()} == {*files}
