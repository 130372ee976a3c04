"""Pictures and captions: where they come from, what is refused, how many are taken, and when they are decoded."""

import csv
import json
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers import (
    linux,
    make_picture,
    make_pictures,
    metrics,
    parse,
    same,
    samples_of,
    state_of,
    weights,
    write_metadata,
)
from PIL import Image

import train_text_to_image as script


pytestmark = pytest.mark.usefixtures("own_cache")
FAST = ("--resolution", 16, "--train_batch_size", 1, "--max_train_steps", 3, "--no-center_crop")


@pytest.fixture
def train(trainer):
    """Trains a little."""
    return trainer(script, *FAST)


@pytest.fixture
def check(train, monkeypatch):
    """Trains on some data up to where the models would be loaded; returns what was said if it ended before."""
    reached = SystemExit("reached the models")

    def load_models(*args):
        raise reached

    def check(data, *flags):
        monkeypatch.setattr(script, "load_models", load_models)
        with pytest.raises(SystemExit) as end:
            train("out", "--train_data_dir" if isinstance(data, Path) else "--dataset_name", data, *flags)
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


def captions_of(folder, *flags):
    """The captions of a folder's pictures by their names in it, in the order in which they are read."""
    records = script.read_records(parse(folder, *flags))
    return {Path(record["name"]).relative_to(folder).as_posix(): record["captions"] for record in records}


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
        metrics(train("folder"), "loss"),
        metrics(train("local", "--train_data_dir", parquet, *columns), "loss"),
        metrics(train("hub", "--dataset_name", "me/pictures", "--cache_dir", tmp_path / "downloads"), "loss"),
        metrics(train("hub-parquet", "--dataset_name", "me/parquet", *columns), "loss"),
        metrics(train("base", base="me/model"), "loss"),
    ]
    assert len(losses[0]) == 3 and all(other == losses[0] for other in losses)
    assert any(file.is_file() for file in (tmp_path / "downloads").rglob("*"))


def test_captions_of_rows(tmp_path):
    """A column of lists of captions is read from parquet, and a row without a caption has none."""
    image = make_picture(tmp_path / "a.png")
    data = {"image": [str(image)] * 3, "text": [["one", "two"], [], None]}
    table = datasets.Dataset.from_dict(data).cast_column("image", datasets.Image())
    (tmp_path / "rows").mkdir()
    table.to_parquet(tmp_path / "rows" / "data.parquet")
    assert [r["captions"] for r in script.read_records(parse(tmp_path / "rows"))] == [["one", "two"], [], []]


def test_rows_of_paths_are_read_anew(train, pictures, tmp_path):
    """Pictures that parquet files only name, and the parquet files themselves, may change between runs."""
    data = shutil.copytree(pictures, tmp_path / "pictures")
    (tmp_path / "rows").mkdir()

    def write(caption):
        names = [str(file) for file in sorted(data.glob("*.[jp]*g"))]
        table = datasets.Dataset.from_dict({"image": names, "text": [caption] * len(names)})
        table.to_parquet(tmp_path / "rows" / "data.parquet")
        os.utime(tmp_path / "rows" / "data.parquet", (1e9, 1e9))

    def losses(name):
        return metrics(train(name, "--train_data_dir", tmp_path / "rows"), "loss")

    write("a cat")
    first = losses("first")
    for file in data.glob("*.[jp]*g"):
        make_picture(file, (48, 48), "pink")
    second = losses("second")
    write("a dog")
    third = losses("third")
    assert first != second != third and losses("again") == third


def test_rows_that_change_and_keep_their_time(train, tmp_path):
    """Pictures in a parquet file that is written anew are encoded anew, though its name and time are the same."""
    (tmp_path / "rows").mkdir()

    def losses(name, colour):
        image = make_picture(tmp_path / "a.png", (48, 48), colour)
        table = datasets.Dataset.from_dict({"image": [str(image)] * 2, "text": ["a cat"] * 2})
        table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "rows" / "data.parquet")
        os.utime(tmp_path / "rows" / "data.parquet", (1e9, 1e9))
        return metrics(train(name, "--train_data_dir", tmp_path / "rows"), "loss")

    assert losses("red", "red") != losses("blue", "blue") != losses("again", "red") == losses("red again", "red")


def test_a_caption_that_turns_bad(check, pictures, tmp_path):
    """It is listed, though its picture was checked before."""
    data = shutil.copytree(pictures, tmp_path / "pictures")
    assert check(data) is None
    text = (data / "metadata.jsonl").read_text()
    (data / "metadata.jsonl").write_text(text.replace("a red", "a \\ud800", 1))
    assert "has a caption with characters" in check(data)


def test_a_caption_file_in_other_letters(tmp_path):
    """An é of two letters beside one of one letter is the same name, as macOS writes it."""
    make_picture(tmp_path / "pictures" / "\u00e9.png")
    (tmp_path / "pictures" / "e\u0301.txt").write_text("a cat")
    assert captions_of(tmp_path / "pictures") == {"\u00e9.png": ["a cat"]}


def test_a_picture_that_changes_after_its_check(pictures, tmp_path):
    """It is not trained on, nor cached under the name of what was checked."""
    data = shutil.copytree(pictures, tmp_path / "pictures")
    samples = samples_of(data, "--resolution", 16)
    make_picture(data / "000.png", (48, 48), "pink")
    with pytest.raises(OSError, match="000.png is not what it was when it was checked"):
        samples.pixels(samples.choose_crop((0, 0)))
    samples.pixels(samples.choose_crop((0, 1)))


def test_a_damaged_list_of_checked_pictures(train, tmp_path):
    """A size that was changed in the cache is found out, and the picture checked anew."""
    flags = ("--encoding_cache_dir", tmp_path / "cache", "--no-center_crop")
    plain = metrics(train("first", *flags), "loss")
    (manifest,) = (tmp_path / "cache" / "checked").iterdir()
    whole = manifest.read_bytes()
    for damaged in (whole.replace(b"48, 48", b"96, 48"), b"[]", b"null", b"1\n[]", b""):
        manifest.write_bytes(damaged)
        assert metrics(train("second", *flags, "--overwrite_output_dir"), "loss") == plain
        assert manifest.read_bytes() == whole


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
    train("out", "--train_data_dir", tmp_path / "pictures", "--center_crop", "--resolution", 8, "--max_train_steps", 1)
    samples = used[0]
    for i, record in enumerate(samples.records):
        size, red = expected[Path(record["name"]).name]
        pixels = samples.pixels(samples.choose_crop((0, i)))
        halves = {"left": pixels[:, :, :3], "right": pixels[:, :, 5:], "top": pixels[:, :3], "bottom": pixels[:, 5:]}
        assert tuple(record["size"]) == size
        assert [name for name, half in halves.items() if half[0].min() > 0.9 and half[2].max() < -0.9] == [red]


# What is refused.


# Captions of pictures that cannot be used: of no picture, blank, none, and half of a pair of surrogates.
NAMED = (("gone.png", "x"), ("blank caption.png", "  "), ("null caption.png", None), ("half letter.png", "a \ud83d"))


def spoil(folder):
    """Adds every kind of bad picture to a folder; returns what is to be said of each, by name."""
    whole = make_picture(folder / "truncated.jpg", (64, 64)).read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) - 60])
    png = make_picture(folder / "sub" / "cut.png", (64, 64)).read_bytes()
    (folder / "sub" / "cut.png").write_bytes(png[: len(png) // 2])
    (folder / "text.png").write_text("<html>404</html>")
    (folder / "zero.webp").write_bytes(b"")
    Image.fromarray(np.full((16, 16), 200, dtype=np.float32)).save(folder / "high float.tif")
    (folder / "high float.txt").write_text("a caption")
    make_picture(folder / "half letter.png")
    make_picture(folder / "no caption.png")
    make_picture(folder / "blank caption.png")
    make_picture(folder / "null caption.png")
    make_picture(folder / "blank txt.png")
    (folder / "blank txt.txt").write_text(" \n")
    texts = {"latin txt": "café".encode("latin-1"), "wide txt": "café".encode("utf-16")}
    for name, text in (texts | {"wide txt without mark": "a cat".encode("utf-16-le")}).items():
        make_picture(folder / f"{name}.png")
        (folder / f"{name}.txt").write_bytes(text)
    for name in ("truncated", "sub/cut", "text", "zero"):
        (folder / f"{name}.txt").write_text("a caption")
    with open(folder / "metadata.jsonl", "a") as file:
        for name, text in NAMED:
            file.write(json.dumps({"file_name": name, "text": text}) + "\n")
    return {
        "blank caption.png": "has no caption",
        "blank txt.png": "has no caption",
        "gone.png": "is not there",
        "half letter.png": "has a caption with characters",
        "high float.tif": "grey values go from 200 to 200",
        "latin txt.png": "latin txt.txt that cannot be read",
        "no caption.png": "has no caption",
        "null caption.png": "has no caption",
        "sub/cut.png": "cannot be decoded",
        "text.png": "is not a picture",
        "truncated.jpg": "cannot be decoded",
        "wide txt without mark.png": "wide txt without mark.txt that cannot be read",
        "wide txt.png": "wide txt.txt that cannot be read",
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
    assert "14 of 20" in check(folder)  # nor does it pass the second time, when the good ones are known


def test_skipped_as_if_not_there(train, tmp_path, capsys):
    """--on_bad_image skip lists the bad pictures and trains as if they were not there, changing none of the files."""
    folder = make_pictures(tmp_path / "pictures")
    clean = metrics(train("clean", "--train_data_dir", folder), "loss")
    bad = spoil(folder)
    before = state_of(folder)
    capsys.readouterr()
    output = train("skipped", "--train_data_dir", folder, "--on_bad_image", "skip")
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
        ("metadata.csv", "file_name,caption\n000.png,x\n", "'text', but ['file_name', 'caption']: see --caption"),
        ("metadata.csv", "file_name;text\n000.png;x\n", "but ['file_name;text']: it needs one, and commas between"),
        (
            "metadata.jsonl",
            '{"file_name": "000.png", "text": "x"}\n\n{"file_name": "001.png", "te',
            "line 3: Untermina",
        ),
        ("metadata.jsonl", '["000.png", "x"]\n', ""),
        ("metadata.jsonl", '{"file_name": null, "text": "x"}\n', "names no file"),
        ("metadata.jsonl", '{"file_name": "x\\u0000/a.png", "text": "x"}\n', "names no file"),
        ("metadata.jsonl", '{"file_name": "000.png", "text": "x"}\n{"text": "y"}\n', "names no file"),
        ("metadata.csv", "file_name,text\n000.png\n", None),
        ("metadata.csv", 'file_name,text\n000.png,"a red circle\n001.png,x\n', "cannot be read"),
        ("metadata.csv", "file_name,text\n000.png,a face, on white\n", "quote captions that have commas"),
        ("metadata.jsonl", '[{"file_name": "000.png", "text": "x"}]\n', "each line has to be an object"),
        ("metadata.csv", 'file_name,text\n000.png,"' + "x" * 200_000 + '"\n', ""),
        ("metadata.jsonl", '{"file_name": "000.png", "text": "caf\xe9"}\n', "cannot be read"),
        ("metadata.csv", "file_name,text\n000.png,caf\xe9\n", "cannot be read"),
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


def test_a_caption_in_place_of_a_name(check, pictures, tmp_path):
    """A text that is too long for a file's name makes one bad picture."""
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    write_metadata(folder, {"file_name": "x" * 300, "text": "000.png"})
    assert check(folder).startswith("7 of 7 ")


def test_empty_folder(check, tmp_path):
    """A folder without pictures is refused by its name."""
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "empty" / "notes.txt").write_text("nothing")
    message = check(tmp_path / "empty")
    assert str(tmp_path / "empty") in message and "no pictures" in message and ".png" in message


@pytest.mark.parametrize(
    "flag, column, says",
    [
        ("--image_column", "width", "holds no pictures"),
        ("--image_column", "text", "holds no pictures"),
        ("--image_column", "sizes", "holds no pictures"),
        ("--image_column", "texts", "holds no pictures"),
        ("--caption_column", "width", "holds no texts, but Value('int64')"),
        ("--caption_column", "sizes", "holds no texts, but {'width': Value('int64')}"),
        ("--caption_column", "image", "holds no texts, but"),
        ("--caption_column", "nothing", None),
        ("--caption_column", "texts", None),
    ],
)
def test_column_of_another_type(check, tmp_path, flag, column, says):
    """A column that holds no pictures, or no captions, is named with its flag; one of nulls has bad rows."""
    picture = {"bytes": make_picture(tmp_path / "a.png").read_bytes(), "path": None}
    row = {"image": picture, "text": "x" * 300, "texts": ["x", "y"], "nothing": None}
    table = datasets.Dataset.from_list([row | {"width": 16, "sizes": {"width": 16}}] * 2)
    (tmp_path / "rows").mkdir()
    table.to_parquet(tmp_path / "rows" / "data.parquet")
    message = check(tmp_path / "rows", flag, column)
    if says:
        assert f"{flag} {column} names a column that {says}" in message
    else:
        assert message is None if column == "texts" else message.startswith("2 of 2 ")


def test_a_column_that_starts_without_pictures(train, used, tmp_path, capsys):
    """A column of pictures is one though its first hundred rows have none."""
    picture = {"bytes": make_picture(tmp_path / "a.png").read_bytes(), "path": None}
    rows = {"image": [None] * 100 + [picture] * 2, "text": ["x"] * 102}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows" / "a.parquet")
    train("out", "--train_data_dir", tmp_path / "rows", "--on_bad_image", "skip")
    assert names_of(used[0]) == ["row 100", "row 101"]
    assert "100 of 102 pictures cannot be used" in capsys.readouterr().out


@pytest.mark.parametrize("column", ["image", "caption"])
def test_unknown_column(check, hub, pictures, column):
    """A column that a Hub data set does not have is refused by name, with the columns that there are."""
    hub.add_folder("datasets/me/pictures", pictures)
    message = check("me/pictures", f"--{column}_column", "nonsense")
    assert f"--{column}_column nonsense" in message and "image, text" in message


def test_unknown_dataset(check, hub):
    """A data set that the Hub does not have is refused by name."""
    assert "me/nothing" in check("me/nothing")


def test_unreadable_caption(check, pictures, tmp_path):
    """A caption file that cannot be opened makes one bad picture."""
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    make_picture(folder / "a.png")
    (folder / "a.txt").symlink_to("nowhere")
    message = check(folder)
    assert message.startswith("1 of 7 ") and f"{folder}/a.png has a caption in a.txt that cannot be read" in message


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_unreadable_metadata(check, pictures, tmp_path, name):
    """A metadata file that cannot be opened is named."""
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    (folder / "sub").mkdir()
    (folder / "sub" / name).symlink_to("nowhere")
    assert f"{folder / 'sub' / name} cannot be read" in check(folder)


@pytest.mark.parametrize("flags", [["--validation_samples", 6], ["--validation_samples", 2, "--max_train_samples", 2]])
def test_nothing_left_to_train_on(check, pictures, flags):
    """Holding out all the pictures there are is refused before any model loads."""
    assert f"--validation_samples {flags[1]} " in check(pictures, *flags)


# How many there are.


ALL = ["000", "001", "002", "003", "004", "005"]


def test_max_train_samples(train, pictures, used, capsys):
    """So many pictures are drawn, by the seed, in their order; more than there are means all of them."""
    train("all", "--max_train_samples", 100, "--max_train_steps", 1)
    assert [names_of(samples) for samples in used] == [ALL, []]
    draws = []
    for seed in range(4):
        flags = ["--max_train_samples", 3, "--seed", seed, "--max_train_steps", 1]
        used.clear()
        capsys.readouterr()
        train(f"seed-{seed}", *flags)
        assert "pictures   3 to train on, 0 held out" in capsys.readouterr().out
        draws.append(names_of(used[0]))
        assert len(draws[-1]) == 3 and draws[-1] == sorted({*draws[-1]} & {*ALL})
    assert len({*map(tuple, draws)}) > 1
    train("again", *flags)
    assert names_of(used[-2]) == draws[-1]


def test_validation_samples(train, pictures, used):
    """Held-out pictures are not trained on, nor drawn by the seed."""
    for seed in (1, 2):
        train(f"seed-{seed}", "--validation_samples", 2, "--seed", seed, "--max_train_steps", 1)
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
    times, size = (folder / "004.png").stat(), (folder / "004.png").stat().st_size
    (folder / "004.png").write_bytes((folder / "000.png").read_bytes()[:size].ljust(size, b"\0"))
    os.utime(folder / "004.png", ns=(times.st_atime_ns, times.st_mtime_ns))  # as cp -p leaves it
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


# Folders and rows that mislead.


def test_a_pipe_is_no_picture(check, tmp_path):
    """Nothing waits for what will never be written to it."""
    folder = make_pictures(tmp_path / "pictures")
    for name in ("pipe.png", "pipe.txt"):
        os.mkfifo(folder / name)
    assert check(folder) is None
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "pipe.png", "text": "a pipe"}\n')
    assert "pipe.png is no file" in check(folder)


def test_links_that_lead_back_are_walked_once(tmp_path):
    """A link to a folder above it, or to one that was walked already, adds no picture; a link to elsewhere does."""
    inside, elsewhere = tmp_path / "pictures", tmp_path / "elsewhere"
    for file in (inside / "a.png", inside / "sub" / "b.png", elsewhere / "c.png"):
        make_picture(file)
        file.with_suffix(".txt").write_text(file.stem)
    (inside / "self").symlink_to(inside)
    (inside / "sub" / "up").symlink_to(inside)
    (inside / "other").symlink_to(elsewhere)
    assert sorted(captions_of(inside).values()) == [["a"], ["b"], ["c"]]


def test_a_number_is_a_caption(tmp_path):
    """It is one in a .csv, so it is one in a .jsonl."""
    make_picture(tmp_path / "a.png")
    write_metadata(tmp_path, *({"file_name": "a.png", "text": number} for number in (7, 3.5, float("nan"))))
    assert captions_of(tmp_path) == {"a.png": ["7", "3.5"]}  # NaN is JSON's and parquet's way to say nothing


def test_rows_for_the_same_picture_are_its_captions(tmp_path):
    """Several rows of metadata for a picture, in one file or more, are several captions to draw from."""
    make_picture(tmp_path / "sub" / "a.png")
    make_picture(tmp_path / "sub" / "b.png")
    rows = [("sub/a.png", "one"), ("sub/b.png", "other"), ("sub/a.png", ["two", "three"]), ("sub/a.png", None)]
    write_metadata(tmp_path, *({"file_name": name, "text": text} for name, text in rows))
    expected = {"sub/a.png": ["one", "two", "three"], "sub/b.png": ["other"]}
    assert captions_of(tmp_path) == expected
    (tmp_path / "sub" / "metadata.csv").write_text("file_name,text\na.png,four\na.png,five\n")
    expected["sub/a.png"] += ["four", "five"]
    assert captions_of(tmp_path) == expected
    (tmp_path / "sub" / "a.txt").write_text("metadata goes before this")
    assert captions_of(tmp_path) == expected


def test_a_picture_has_many_names(tmp_path, monkeypatch):
    """Metadata may name a picture in any way that leads to it, and a letter with its accent as one or as two."""
    inside, elsewhere = tmp_path / "pictures", tmp_path / "elsewhere"
    for name in ("a.png", "b.png", "c.png", "e\u0301.png", "sub/d.png", "sub/e\u0301.png", "sub/\xe9.png"):
        make_picture(inside / name)
    make_picture(elsewhere / "x.png")
    (inside / "to sub").symlink_to(inside / "sub")
    rows = ["./a.png", "sub/../b.png", str(inside / "c.png"), "\xe9.png", "to sub/d.png", "../elsewhere/x.png"]
    rows += ["sub/e\u0301.png", "sub/\xe9.png"]
    write_metadata(inside, *({"file_name": name, "text": name} for name in rows))
    monkeypatch.chdir(tmp_path)
    records = script.read_records(parse("pictures"))
    assert sorted(text for record in records for text in record["captions"]) == sorted(rows)
    assert len(records) == len(rows) and all(len(record["captions"]) == 1 for record in records)
    assert [record["captions"] for record in records if "sub/\xe9" in record["name"]] == [["sub/\xe9.png"]]


def test_suffixes_in_capitals(tmp_path):
    """The suffixes of captions and metadata can be in capitals as those of pictures can."""
    make_picture(tmp_path / "A.PNG")
    (tmp_path / "A.TXT").write_text("by text file")
    make_picture(tmp_path / "B.PNG")
    (tmp_path / "METADATA.CSV").write_text("file_name,text\nB.PNG,by metadata\n")
    assert captions_of(tmp_path) == {"A.PNG": ["by text file"], "B.PNG": ["by metadata"]}


def test_folders_with_names_of_files(check, tmp_path, capsys):
    """Folders named as pictures, metadata or captions are walked as others are; one that metadata names is bad."""
    for name in ("a.png", "metadata.jsonl", "metadata.csv", "b.txt", "rows.parquet"):
        make_picture(tmp_path / "pictures" / name / "x.png")
        (tmp_path / "pictures" / name / "x.txt").write_text(name)
    make_picture(tmp_path / "pictures" / "b.png")
    write_metadata(tmp_path / "pictures" / "a.png", {"file_name": "../b.png", "text": "b"})
    assert len(captions_of(tmp_path / "pictures")) == 6 and "passed over" not in capsys.readouterr().out
    assert check(tmp_path / "pictures") is None
    write_metadata(
        tmp_path / "pictures" / "a.png", {"file_name": "../b.png", "text": ""}, {"file_name": "", "text": "x"}
    )
    message = check(tmp_path / "pictures")
    assert message.startswith("2 of 7 ") and f"  {tmp_path / 'pictures' / 'a.png'} is no file" in message


def test_what_is_passed_over_is_counted(tmp_path, capsys):
    """One line counts what is not read, by suffix; captions, metadata and hidden files are not in it."""
    for name in ("a.avif", "b.jfif"):
        make_picture(tmp_path / name, format={".avif": "AVIF", ".jfif": "JPEG"}[Path(name).suffix])
        assert script.open_image((tmp_path / name).read_bytes()).size == (16, 16)
    (tmp_path / "a.txt").write_text("one")
    write_metadata(tmp_path, {"file_name": "b.jfif", "text": "two"})
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    assert captions_of(tmp_path) == {"a.avif": ["one"], "b.jfif": ["two"]}
    assert capsys.readouterr().out == ""
    for name in ("c.heic", "sub/d.HEIC", "LICENSE", "c.txt", "b.txt", "x.pdf", "c.json", "y.json", "z.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert captions_of(tmp_path) == {"a.avif": ["one"], "b.jfif": ["two"]}
    assert capsys.readouterr().out == "passed over: 3 .json, 2 .txt, 2 .heic, 1 without a suffix, 1 .pdf\n"


def test_parquet_beside_pictures(tmp_path, capsys):
    """Where there are pictures, parquet files only describe them, as img2dataset leaves them: they are passed over."""
    make_picture(tmp_path / "00000" / "000000000.jpg")
    (tmp_path / "00000" / "000000000.txt").write_text("a caption")
    table = datasets.Dataset.from_dict({"url": ["https://example.com/a.jpg"], "caption": ["a caption"]})
    table.to_parquet(tmp_path / "00000.parquet")
    capsys.readouterr()
    assert captions_of(tmp_path) == {"00000/000000000.jpg": ["a caption"]}
    assert capsys.readouterr().out == "passed over: 1 .parquet\n"


@linux
def test_an_unreadable_folder_is_refused(tmp_path):
    """A folder that may not be read ends the run by its name, as the pictures in it would be missed without a word."""
    make_picture(tmp_path / "pictures" / "a.png")
    make_picture(tmp_path / "pictures" / "closed" / "b.png")
    (tmp_path / "pictures").chmod(0o755)
    (tmp_path / "pictures" / "closed").chmod(0)

    def enter():
        os.chdir(tmp_path / "pictures")
        if os.geteuid() == 0:  # who may read anything
            os.setuid(65534)

    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), initializer=enter) as pool:
            with pytest.raises(SystemExit, match="folder ./closed cannot be read: Permission denied"):
                pool.submit(script.list_files, ".").result(timeout=60)
    finally:
        (tmp_path / "pictures" / "closed").chmod(0o755)


def test_a_parquet_folder_is_no_pattern(tmp_path):
    """A folder whose name reads as a pattern is itself, and not another one that the pattern matches."""
    for name, caption in (("data[12]", "mine"), ("data1", "not mine")):
        (tmp_path / name).mkdir()
        picture = {"bytes": make_picture(tmp_path / f"{caption}.png").read_bytes(), "path": None}
        rows = datasets.Dataset.from_list([{"image": picture, "text": caption}])
        rows.to_parquet(tmp_path / name / "rows.parquet")
    records = script.read_records(parse(tmp_path / "data[12]"))
    assert [record["captions"] for record in records] == [["mine"]]
