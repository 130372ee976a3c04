"""evaluate.py: the formulas by hand, the intervals by simulation, pairs, kept features, ranks, refusals."""

import csv
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, finish, run, start_ranks, state_of
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

import evaluate


CLIP = ROOT / "demo" / "clip"
COLORS = {"red": (220, 30, 35), "green": (40, 160, 65), "blue": (40, 80, 220), "yellow": (250, 220, 40)}


def save_squares(folder, count, colors=tuple(COLORS), seed=0, **told):
    """Saves pictures of squares, each with its caption in metadata.jsonl; told are further columns."""
    folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        front, back = rng.choice([*colors], 2, replace=False)
        picture = Image.new("RGB", (64, 64), COLORS[back])
        left, top = (int(number) for number in rng.integers(10, 20, 2))
        picture.paste(COLORS[front], (left, top, left + 32, top + 32))
        picture.save(folder / f"{i:03d}.png")
        caption = f"a {front} square on a {back} background"
        rows.append({"file_name": f"{i:03d}.png", "text": caption, "seed": i} | told)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """measure(*flags) measures with the demo's CLIP, and returns metrics.json."""
    monkeypatch.chdir(tmp_path)

    def flags_to_metrics(*flags):
        run(evaluate, "--clip_model", CLIP, "--encoding_cache_dir", tmp_path / "cache", *flags)
        return json.loads((tmp_path / "evaluated" / "metrics.json").read_text())

    return flags_to_metrics


def features(n, d, seed=0):
    """Random features."""
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, d)))


# The formulas.


def test_clip_score_by_hand():
    """100 times the cosine, and 0 for what points away."""
    images, captions = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[8.0, 6.0], [-2.0, 1.0]])
    assert evaluate.clip_score(images, captions).tolist() == [pytest.approx(96), 0]


def test_clip_directional_by_hand():
    """The cosine between the two changes, on unit vectors."""
    before, after = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    assert evaluate.clip_directional(after, after, before, before).item() == pytest.approx(1)
    assert evaluate.clip_directional(after, before, before, after).item() == pytest.approx(-1)
    told = torch.tensor([[0.0, 1.0]]), torch.tensor([[-1.0, 0.0]])  # (-1, 1) of pictures, (1, 1) of captions
    assert evaluate.clip_directional(after, told[0], before, told[1]).item() == pytest.approx(0, abs=1e-7)


def test_clip_i_by_hand():
    """The mean over all pairs."""
    images, references = features(3, 4), features(5, 4, 1)
    pairs = torch.nn.functional.cosine_similarity(images[:, None], references[None], dim=2)
    torch.testing.assert_close(evaluate.clip_i(images, references), pairs.mean(1))


def test_frechet_by_hand():
    """Equal sets 0, a shifted set the squared shift, else the formula with the root of a matrix."""
    x, y = features(50, 4), features(60, 4, 1) @ torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]).double()) + 0.5
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0]).double()
    assert evaluate.frechet(x, x).item() == pytest.approx(0, abs=1e-9)
    assert evaluate.frechet(x, x + shift).item() == pytest.approx(5.25)
    values, vectors = np.linalg.eig(np.cov(x.T) @ np.cov(y.T))
    root = vectors @ np.diag(np.sqrt(values)) @ np.linalg.inv(vectors)
    means = ((x.mean(0) - y.mean(0)) ** 2).sum().item()
    wanted = means + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    assert evaluate.frechet(x, y).item() == pytest.approx(wanted)


def test_kid_by_hand():
    """The sums over all pairs but those of a picture with itself; its mean over sets of one law is 0."""
    x, y = features(7, 3).numpy(), features(5, 3, 1).numpy()
    pairs = [[((a @ b) / 3 + 1) ** 3 for b in y] for a in x]
    own = [[((a @ b) / 3 + 1) ** 3 for j, b in enumerate(z) for i, a in enumerate(z) if i != j] for z in (x, y)]
    wanted = np.mean(own[0]) + np.mean(own[1]) - 2 * np.mean(pairs)
    assert evaluate.kid(torch.from_numpy(x), torch.from_numpy(y)).item() == pytest.approx(wanted)
    values = [evaluate.kid(features(10, 3, seed), features(10, 3, seed + 1000)).item() for seed in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)


def test_kernels_in_parts():
    """More rows than are taken at once give the same mean."""
    x = features(5000, 2)

    def kernel(a, b):
        return a @ b.T

    assert evaluate.mean_kernel(kernel, x, x).item() == pytest.approx((x.mean(0) ** 2).sum().item())
    wanted = (x.sum(0).square().sum() - x.square().sum()) / (5000 * 4999)
    assert evaluate.mean_of_others(kernel, x).item() == pytest.approx(wanted.item())


def test_cmmd_by_hand():
    """1000 times the squared distance of the means in the space of a Gaussian kernel, of unit vectors."""
    x, y = features(6, 3), features(4, 3, 1)
    assert evaluate.cmmd(x, 7 * x).item() == pytest.approx(0, abs=1e-9)

    def mean(a, b):
        a, b = (z.numpy() / np.linalg.norm(z.numpy(), axis=1, keepdims=True) for z in (a, b))
        return np.mean([np.exp(-np.sum((p - q) ** 2) / (2 * 10**2)) for p in a for q in b])

    assert evaluate.cmmd(x, y).item() == pytest.approx(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)))


# The intervals.


def interval(statistic, *counts):
    """The interval of one number, as of a metric of single pictures."""
    (found,) = evaluate.intervals(lambda *rows: [float(statistic(*rows))], 200, *counts)
    return found


@pytest.mark.parametrize("freedom", [2, 5, 19, 20, 60])
def test_quantiles(freedom):
    """Of so many draws of Student's t, one in forty lies above."""
    rng = np.random.default_rng(0)
    above = rng.standard_t(freedom, 400_000) > evaluate.student_quantile(freedom)
    assert above.mean() == pytest.approx(0.025, abs=1e-3)


@pytest.mark.parametrize("count, quantile", [(12, 2.201), (30, 2.0452), (121, 1.9799)])
def test_the_interval_of_a_mean_is_students(count, quantile):
    """In any order of the pictures."""
    x = features(count, 1)[:, 0]
    found = interval(lambda rows: x[rows].mean(), count)
    reach = quantile * x.std().item() / np.sqrt(count)
    assert found["value"] == pytest.approx(x.mean().item())
    assert found["high"] - found["value"] == pytest.approx(reach, rel=1e-4)
    assert found["value"] - found["low"] == pytest.approx(reach, rel=1e-4)


@pytest.mark.parametrize("count", [8, 50])
def test_paired_intervals_cover(count):
    """19 of 20 hold the true difference, and they are short: what both pictures of a pair share cancels."""
    hits, reaches = 0, []
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        shared, noise = rng.normal(scale=5, size=count), rng.exponential(size=(2, count))
        a, b = (torch.from_numpy(shared + part) for part in noise)
        found = interval(lambda rows, a=a, b=b: b[rows].mean() + 0.3 - a[rows].mean(), count)
        hits += found["low"] <= 0.3 <= found["high"]
        reaches.append(found["high"] - found["value"])
    assert 930 <= hits <= 972
    assert np.mean(reaches) < 1.1 * evaluate.student_quantile(count - 1) * np.sqrt(2 / count)


def test_the_smaller_set_widens_an_interval():
    """Its degrees of freedom count, whichever it is."""
    x, y = features(40, 1)[:, 0], features(3, 1, 1)[:, 0]
    one = interval(lambda i, j: x[i].mean() - y[j].mean(), 40, 3)
    other = interval(lambda j, i: x[i].mean() - y[j].mean(), 3, 40)
    reach = 4.3027 * np.sqrt(x.var().item() / 40 + y.var().item() / 3)
    for found in (one, other):
        assert found["high"] - found["value"] == pytest.approx(reach, rel=0.01)


def test_distances_leave_out_parts(monkeypatch):
    """Twenty of each set, as each takes its time; of numbers of single pictures each one."""
    calls = []
    monkeypatch.setattr(evaluate, "values_of", lambda *given: calls.append(given) or torch.zeros(1))
    pictures = {"images": dict.fromkeys(range(50)), "reference": dict.fromkeys(range(60))}
    evaluate.measure("kid", pictures, {}, SimpleNamespace(signum=0))
    assert len(calls) == 1 + 20 + 20
    calls.clear()
    evaluate.measure("clip_i", pictures, {}, SimpleNamespace(signum=0))
    assert len(calls) == 1 + 50 + 60


def test_intervals_of_two_sets_cover():
    """Of a distance to --reference, both sets move it."""
    hits = 0
    for seed in range(400):
        x, y = features(60, 2, seed), features(60, 2, seed + 1000) + 1

        def distance(i, j, x=x, y=y):
            return ((x[i].mean(0) - y[j].mean(0)) ** 2).sum() - 2 * 2 / 60

        (found,) = evaluate.intervals(lambda *rows: [distance(*rows).item()], 20, 60, 60)
        hits += found["low"] <= 2 <= found["high"]
    assert 368 <= hits <= 392


# The pictures.


def test_what_it_says(measure, tmp_path, capsys):
    """Figures with intervals, a row for each picture, the best and the worst; and a rotated caption list is worse."""
    right = save_squares(tmp_path / "right", 20)
    told = measure("--images", right)
    score = told["metrics"]["clip_score"]["images"]
    assert told["clip_model"] == str(CLIP) and told["images"] == {"folder": str(right), "pictures": 20}
    with open(tmp_path / "evaluated" / "pictures.csv") as file:
        rows = [*csv.DictReader(file)]
    values = [float(row["clip_score"]) for row in rows]
    assert score["value"] == pytest.approx(np.mean(values)) and score["low"] < score["value"] < score["high"]
    assert rows[3]["file"] == str(right / "003.png") and rows[3]["folder"] == "images"
    text = capsys.readouterr().out
    assert f"{CLIP}; 20 images" in text and re.search(r"clip_score +images +[\d.]+ \([\d.]+ to [\d.]+\)", text)
    sheet = np.asarray(Image.open(tmp_path / "evaluated" / "best_and_worst.png"))
    assert sheet.shape == (2 * 256, 10 * 256, 3)
    best = Image.open(rows[int(np.argmax(values))]["file"]).resize((256, 256), Image.Resampling.BICUBIC)
    assert (sheet[:256, :256] == np.asarray(best)).all()
    worst = Image.open(rows[int(np.argmin(values))]["file"]).resize((256, 256), Image.Resampling.BICUBIC)
    assert (sheet[256:, -256:] == np.asarray(worst)).all()
    wrong = shutil.copytree(right, tmp_path / "wrong")
    lines = [json.loads(line) for line in (right / "metadata.jsonl").read_text().splitlines()]
    captions = [row["text"] for row in lines]
    rotated = [row | {"text": text} for row, text in zip(lines, captions[1:] + captions[:1])]
    (wrong / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rotated))
    worse = measure("--images", wrong)["metrics"]["clip_score"]["images"]
    assert worse["high"] < score["low"]


def test_captions_in_other_places(measure, tmp_path):
    """A metadata.csv, another column, or .txt files."""
    first = save_squares(tmp_path / "jsonl", 4)
    wanted = measure("--images", first)["metrics"]
    rows = [json.loads(line) for line in (first / "metadata.jsonl").read_text().splitlines()]
    for name in ("csv", "txt"):
        shutil.copytree(first, tmp_path / name)
        (tmp_path / name / "metadata.jsonl").unlink()
    with open(tmp_path / "csv" / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["file_name", "caption"], *[[row["file_name"], row["text"]] for row in rows]])
    for row in rows:
        (tmp_path / "txt" / row["file_name"]).with_suffix(".txt").write_text(row["text"] + "\n")
    assert measure("--images", tmp_path / "csv", "--caption_column", "caption")["metrics"] == wanted
    assert measure("--images", tmp_path / "txt")["metrics"] == wanted


def test_pictures_are_those_that_training_reads(measure, tmp_path):
    """By their names' endings."""
    folder = save_squares(tmp_path / "some", 4)
    Image.new("RGB", (64, 64)).save(folder / "004.jfif", "JPEG")
    (folder / "004.txt").write_text("a black square")
    assert measure("--images", folder)["images"]["pictures"] == 5


def test_rows_that_training_reads(measure, tmp_path):
    """Names with a dot before them are those of the files, an empty caption gives way to that of a .txt."""
    folder = save_squares(tmp_path / "some", 4)
    wanted = measure("--images", folder)["metrics"]
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "002.txt").write_text(rows[2]["text"])
    rows = [row | {"file_name": f"./{row['file_name']}"} for row in rows] + [{"file_name": ["000.png"]}]
    rows[2]["text"] = ""
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert measure("--images", folder)["metrics"] == wanted
    with open(folder / "metadata.csv", "w") as file:  # beside a metadata.jsonl it is not read
        file.write("file_name,text\n000.png,a,b\n")
    assert measure("--images", folder)["metrics"] == wanted


def test_captions_of_a_reference_are_not_read(measure, tmp_path):
    """So that none of them stops anything."""
    folder = save_squares(tmp_path / "some", 4)
    reference = shutil.copytree(folder, tmp_path / "reference")
    (reference / "metadata.jsonl").write_text("{torn")
    (reference / "000.txt").write_bytes(b"\xff")
    measure("--images", folder, "--reference", reference, "--metrics", "clip_i")


def test_other_preprocessing_has_other_features(measure, tmp_path):
    """The same weights see something else then."""
    folder = save_squares(tmp_path / "some", 4)
    other = shutil.copytree(CLIP, tmp_path / "other")
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.1, 0.2, 0.3]}))
    assert measure("--images", folder)["metrics"] != measure("--images", folder, "--clip_model", other)["metrics"]


def test_the_sheet_is_of_these_pictures(measure, tmp_path):
    """An older one goes if there is none to take its place."""
    folder = save_squares(tmp_path / "some", 20)
    measure("--images", folder)
    assert (tmp_path / "evaluated" / "best_and_worst.png").exists()
    measure("--images", folder, "--reference", folder, "--metrics", "kid")
    assert not (tmp_path / "evaluated" / "best_and_worst.png").exists()


def test_pairs(measure, tmp_path, capsys):
    """Two folders of the same prompts and seeds: the interval of the difference, and a sentence."""
    first = save_squares(tmp_path / "first", 12)
    same = shutil.copytree(first, tmp_path / "same")
    told = measure("--images", first, "--compare", same)["metrics"]["clip_score"]
    assert told["difference"] == {"value": 0, "low": 0, "high": 0} and told["images"] == told["compare"]
    assert "clip_score: no difference is shown" in capsys.readouterr().out
    for file in same.glob("*.png"):
        Image.new("RGB", (64, 64), "white").save(file)
    told = measure("--images", first, "--compare", same)["metrics"]["clip_score"]
    assert told["difference"]["high"] < 0
    assert told["difference"]["value"] == pytest.approx(told["compare"]["value"] - told["images"]["value"])
    said = "clip_score: a difference is shown. --compare is "
    assert f"{said}lower, which is worse.\n" in capsys.readouterr().out
    measure("--images", same, "--compare", first)
    assert f"{said}higher, which is better.\n" in capsys.readouterr().out
    few = save_squares(tmp_path / "few", 20)
    far = shutil.copytree(few, tmp_path / "far")
    for file in far.glob("*.png"):
        Image.new("RGB", (64, 64), "white").save(file)
    measure("--images", few, "--compare", far, "--reference", few, "--metrics", "kid")
    assert "kid: a difference is shown. --compare is higher, which is worse.\n" in capsys.readouterr().out
    measure("--images", first, "--compare", same)
    with open(tmp_path / "evaluated" / "pictures.csv") as file:
        assert [row["folder"] for row in csv.DictReader(file)] == ["images"] * 12 + ["compare"] * 12


def test_sets(measure, tmp_path):
    """Distances to a reference: none from itself, more from other pictures; and a subject is told from others."""
    kinds = {"red": (("red", "blue"), 1), "same": (("red", "blue"), 2), "other": (("green", "yellow"), 3)}
    folders = {name: save_squares(tmp_path / name, 40, colors, seed) for name, (colors, seed) in kinds.items()}
    metrics = ("--metrics", "kid", "cmmd", "frechet", "clip_i")
    found = {}
    for name, folder in folders.items():
        told = measure("--images", folder, "--reference", folders["red"], *metrics)["metrics"]
        found[name] = {metric: told[metric]["images"]["value"] for metric in told}
    for metric in ("kid", "cmmd", "frechet"):
        assert found["red"][metric] < found["same"][metric] + 1e-9 < found["other"][metric]
        assert found["same"][metric] < 0.2 * found["other"][metric]
    assert found["red"]["cmmd"] == pytest.approx(0, abs=1e-6) == found["red"]["frechet"]
    assert found["red"]["clip_i"] > found["other"]["clip_i"] + 0.1


def test_several_metrics_of_single_pictures(measure, tmp_path):
    """Each has its column, and the sheet goes by the first one."""
    folder, reference = save_squares(tmp_path / "some", 20), save_squares(tmp_path / "reference", 5, seed=1)
    flags = ("--images", folder, "--reference", reference, "--metrics")
    sheets = []
    for metrics in (("clip_score",), ("clip_score", "clip_i"), ("clip_i", "clip_score")):
        reference_flags = flags if "clip_i" in metrics else (*flags[:2], "--metrics")
        told = measure(*reference_flags, *metrics)["metrics"]
        with open(tmp_path / "evaluated" / "pictures.csv") as file:
            rows = [*csv.DictReader(file)]
        for metric in metrics:
            assert told[metric]["images"]["value"] == pytest.approx(np.mean([float(row[metric]) for row in rows]))
        sheets.append((tmp_path / "evaluated" / "best_and_worst.png").read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]


def test_fid_takes_inceptions_features():
    """Of both sets, and CLIP's for the other distances."""
    names = ("images", "reference", "inception of images", "inception of reference")
    found = {name: features(30, 4, seed) + seed for seed, name in enumerate(names)}
    rows, others = torch.arange(20), torch.arange(25)
    wanted = evaluate.frechet(found["inception of images"][:20], found["inception of reference"][:25])
    assert evaluate.values_of("fid", found, "images", rows, others) == wanted
    wanted = evaluate.frechet(found["images"][:20], found["reference"][:25])
    assert evaluate.values_of("frechet", found, "images", rows, others) == wanted


def test_a_signal_ends_the_measuring(measure, tmp_path, monkeypatch, capsys):
    """Which may take minutes, and nothing is written."""
    folder = save_squares(tmp_path / "some", 25)
    original = evaluate.kid

    def kid(x, y):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(x, y)

    monkeypatch.setitem(evaluate.FORMULAS, "kid", kid)
    with pytest.raises(SystemExit) as end:
        measure("--images", folder, "--reference", folder, "--metrics", "kid")
    assert end.value.code == 143 and "Stopped by SIGTERM" in capsys.readouterr().err
    assert not (tmp_path / "evaluated").exists()


def test_an_inception_that_does_not_load(measure, tmp_path, monkeypatch):
    """As without a network: a sentence."""
    (tmp_path / "library" / "torch_fidelity").mkdir(parents=True)
    (tmp_path / "library" / "torch_fidelity" / "__init__.py").touch()
    lines = "def create_feature_extractor(*_, **__):\n    raise OSError('no route to host')\n"
    (tmp_path / "library" / "torch_fidelity" / "utils.py").write_text(lines)
    monkeypatch.syspath_prepend(tmp_path / "library")
    monkeypatch.setattr(evaluate, "LEAST", {})
    folder = save_squares(tmp_path / "some", 4)
    try:
        with pytest.raises(SystemExit, match="Inception for --metrics fid cannot be loaded: no route to host"):
            measure("--images", folder, "--reference", folder, "--metrics", "fid")
    finally:  # so that other tests have no such library
        for name in ("torch_fidelity", "torch_fidelity.utils"):
            sys.modules.pop(name, None)


def test_edits(measure, tmp_path):
    """The change of pictures goes the way of the change of captions, and not the other way."""
    before, after = save_squares(tmp_path / "before", 10, seed=1), save_squares(tmp_path / "after", 10, seed=2)
    flags = ("--images", after, "--originals", before, "--metrics", "clip_directional")
    assert measure(*flags)["metrics"]["clip_directional"]["images"]["low"] > 0.2
    shutil.copy(before / "metadata.jsonl", tmp_path / "kept")
    shutil.copy(after / "metadata.jsonl", before)
    shutil.copy(tmp_path / "kept", after / "metadata.jsonl")
    assert measure(*flags)["metrics"]["clip_directional"]["images"]["high"] < -0.2


def test_features_are_clips(measure, tmp_path):
    """A score is that of CLIP on the picture's bytes and the caption, computed by hand."""
    folder = save_squares(tmp_path / "some", 3)
    measure("--images", folder)
    with open(tmp_path / "evaluated" / "pictures.csv") as file:
        found = [float(row["clip_score"]) for row in csv.DictReader(file)]
    model = CLIPModel.from_pretrained(CLIP, dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(CLIP)
    settings = json.loads((CLIP / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("image_mean", "image_std"))
    for i, row in enumerate(map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())):
        pixels = torch.from_numpy(np.array(Image.open(folder / row["file_name"]))).permute(2, 0, 1) / 255
        words = tokenizer(row["text"], return_tensors="pt")
        with torch.no_grad():
            out = model(pixel_values=((pixels - mean) / std)[None], **words)
        cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds).item()
        assert found[i] == pytest.approx(max(100 * cosine, 0), abs=1e-3)


def test_features_are_kept(measure, tmp_path, monkeypatch):
    """By picture and model: a second time nothing is encoded, and after a change that picture alone."""
    folder = save_squares(tmp_path / "some", 6)
    save_squares(tmp_path / "reference", 20)
    flags = ("--images", folder, "--reference", folder, "--metrics", "clip_i")
    wanted, opened = measure(*flags)["metrics"], []
    original = evaluate.open_picture
    monkeypatch.setattr(evaluate, "open_picture", lambda file: (opened.append(Path(file).name), original(file))[1])
    sheet = 6  # the three best and the three worst
    assert measure(*flags)["metrics"] == wanted and len(opened) == sheet
    shutil.copy(folder / "001.png", folder / "002.png")
    measure(*flags)
    assert len(opened) == 2 * sheet  # its bytes were known
    Image.new("RGB", (64, 64)).save(folder / "003.png")
    changed = measure(*flags)["metrics"]
    assert opened[2 * sheet] == "003.png" and len(opened) == 3 * sheet + 1 and changed != wanted
    assert len([*(tmp_path / "cache" / "features").glob("*/*")]) == 7  # of six pictures, and of one that was changed


def test_an_interval_is_that_of_the_rows(measure, tmp_path):
    """A mean's is Student's, of the numbers in pictures.csv."""
    told = measure("--images", save_squares(tmp_path / "some", 30))["metrics"]["clip_score"]["images"]
    with open(tmp_path / "evaluated" / "pictures.csv", newline="") as lines:
        scores = [float(row["clip_score"]) for row in csv.DictReader(lines)]
    assert told["value"] == pytest.approx(np.mean(scores))
    reach = 2.0452 * np.std(scores, ddof=1) / np.sqrt(30)
    assert told["high"] - told["value"] == pytest.approx(reach, rel=1e-4)


def test_names_do_not_matter(measure, tmp_path):
    """Another order of the same pictures gives the same figures, intervals and all."""
    folder, turned = save_squares(tmp_path / "some", 45), tmp_path / "turned"
    reference = save_squares(tmp_path / "reference", 25, seed=1)
    turned.mkdir()
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        shutil.copy(folder / row["file_name"], turned / f"{(7 * i) % 45:03d}.png")
        row["file_name"] = f"{(7 * i) % 45:03d}.png"
    (turned / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--reference", reference, "--metrics", "clip_score", "clip_i", "kid", "--images")
    assert measure(*flags, folder)["metrics"] == measure(*flags, turned)["metrics"]


def test_a_broken_picture_keeps_features(measure, tmp_path, monkeypatch):
    """Those that were encoded before it are not encoded again."""
    folder, opened = save_squares(tmp_path / "some", 5), []
    whole = (folder / "003.png").read_bytes()
    (folder / "003.png").write_bytes(b"torn")
    original = evaluate.open_picture
    monkeypatch.setattr(evaluate, "open_picture", lambda file: (original(file), opened.append(file.name))[0])
    with pytest.raises(SystemExit, match="003.png does not open as a picture: Pillow knows no such format"):
        measure("--images", folder, "--batch_size", 1)
    kept = len(opened)
    assert kept > 0
    (folder / "003.png").write_bytes(whole)
    monkeypatch.setattr(evaluate, "write_results", lambda *_: None)
    with pytest.raises(FileNotFoundError):
        measure("--images", folder, "--batch_size", 1)
    assert sorted(opened) == sorted(path.name for path in folder.glob("*.png"))


def test_a_signal_keeps_features(measure, tmp_path, monkeypatch, capsys):
    """It ends after the batch at hand, with 128 + signal, and what was encoded is not encoded again."""
    folder, opened = save_squares(tmp_path / "some", 5), []
    original = evaluate.open_picture

    def open_and_stop(file):
        opened.append(file)
        if len(opened) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(file)

    monkeypatch.setattr(evaluate, "open_picture", open_and_stop)
    with pytest.raises(SystemExit) as end:
        measure("--images", folder, "--batch_size", 1)
    assert end.value.code == 143 and len(opened) == 2
    assert "Stopped by SIGTERM. The same command goes on from here." in capsys.readouterr().err
    measure("--images", folder, "--batch_size", 1)
    assert len(opened) == 2 + 3 + 4  # those that are missing, and four for the sheet


def test_a_cache_that_fails(measure, tmp_path, monkeypatch):
    """A torn file is made anew, and on a full disk the figures are said all the same."""
    folder = save_squares(tmp_path / "some", 4)
    wanted = measure("--images", folder, "--batch_size", 1)["metrics"]
    kept = [*(tmp_path / "cache" / "features").glob("*/*")]
    assert len(kept) == 4
    kept[2].write_bytes(kept[2].read_bytes()[:50])
    before = state_of(kept[0].parent)
    assert measure("--images", folder, "--batch_size", 1)["metrics"] == wanted
    after = state_of(kept[0].parent)
    assert [name for name in after if after[name] != before[name]] == [kept[2].name]
    original = evaluate.replace_file

    def full(path, data):
        if "features" in path.parts:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, data)

    monkeypatch.setattr(evaluate, "replace_file", full)
    assert (
        measure("--images", folder, "--batch_size", 1, "--encoding_cache_dir", tmp_path / "full")["metrics"] == wanted
    )


def test_batches_and_alpha(measure, tmp_path):
    """Batch-mates change no more than last bits; pictures are seen upright and on white, as training sees them."""
    folder = save_squares(tmp_path / "some", 5)
    values = []
    for size in (1, 5):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        values.append(measure("--images", folder, "--batch_size", size)["metrics"]["clip_score"]["images"]["value"])
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    turned = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    seen = evaluate.open_picture(tmp_path / "turned.png")
    assert seen.size == (20, 40) and seen.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.launch
def test_two_processes(measure, start, tmp_path):
    """Ranks share the pictures, and say the same."""
    folder, reference = save_squares(tmp_path / "some", 21), save_squares(tmp_path / "reference", 20, seed=1)
    flags = ("--images", folder, "--compare", folder, "--reference", reference, "--metrics", "clip_score", "kid")
    wanted = measure(*flags)["metrics"]
    words = ("--clip_model", CLIP, *flags, "--output_dir", tmp_path / "of-two")

    def begin(given, environment, turn):
        own = {"XDG_CACHE_HOME": str(tmp_path / f"home-{(turn + int(environment['RANK'])) % 2}")}
        return start(given, script="evaluate", environment=environment | own)

    for turn in range(2):  # the second time on machines of which the other one has kept features
        finish(functools.partial(begin, turn=turn), words, 2)
        told = json.loads((tmp_path / "of-two" / "metrics.json").read_text())["metrics"]
        for metric in wanted:
            for column, figure in wanted[metric].items():
                assert told[metric][column] == {
                    name: pytest.approx(v, rel=1e-4, abs=1e-6) for name, v in figure.items()
                }


@pytest.mark.launch
@pytest.mark.parametrize("broken", [0, 1], ids=["first", "second"])
def test_two_processes_end_together(start, tmp_path, broken):
    """Whichever of them meets a broken picture: the first one says so, once, and both keep what they have."""
    folder = save_squares(tmp_path / "some", 12)
    for number in range(256):  # until it is that process's turn
        (folder / "004.png").write_bytes(bytes([number]) * 99)
        files = [file.read_bytes() for file in folder.glob("*.png")]
        order = sorted(files, key=lambda data: hashlib.blake2b(data, digest_size=16).hexdigest())
        if order.index(bytes([number]) * 99) % 2 == broken:
            break
    flags = ("--clip_model", CLIP, "--images", folder, "--batch_size", 1, "--encoding_cache_dir", tmp_path / "cache")
    runs = start_ranks(lambda *given, **how: start(*given, script="evaluate", **how), flags, 2)
    assert [process.wait(60) for process in runs] == [1, 1]
    said = "".join(process.output() for process in runs)
    assert said.count("does not open as a picture") == 1 and "Traceback" not in said
    assert len([*(tmp_path / "cache" / "features").glob("*/*")]) >= 6  # all of the other one


@pytest.mark.launch
def test_a_signal_to_one_of_two_processes(start, tmp_path):
    """Ends both with 128 + signal, once they have done what they were at; the first one says so."""
    folder = save_squares(tmp_path / "some", 300)
    flags = ("--clip_model", CLIP, "--images", folder, "--batch_size", 1, "--encoding_cache_dir", tmp_path / "cache")
    runs = start_ranks(lambda *given, **how: start(*given, script="evaluate", **how), flags, 2)
    runs[0].until(lambda: [*(tmp_path / "cache" / "features").glob("*/*")])
    os.kill(runs[1].pid, signal.SIGTERM)
    assert [process.wait(60) for process in runs] == [143, 143]
    said = "".join(process.output() for process in runs)
    assert said.count("Stopped by SIGTERM. The same command goes on from here.") == 1 and "Traceback" not in said


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--images nowhere", "--images nowhere is not a folder"),
        ("--images empty", "--metrics clip_score takes 3 pictures or more, and the folder of --images holds 0"),
        ("--images alike", "--images alike has two pictures named 000: rename one"),
        ("--images some --compare twenty", "take pictures of the same names, and --images has no 0\\d\\d"),
        ("--images= --compare some", "--images: must be a path"),
        ("--images linked", "linked/gone.png, or its caption, cannot be read: .*No such file"),
        ("--images deep", "deep/metadata.jsonl cannot be read: maximum recursion depth"),
        ("--images some --compare sown", "sown/002.png has the seed '7', and some/002.png '2': draw both"),
        ("--images blank", "takes captions, and .*blank/000.png has none: give a metadata.jsonl"),
        ("--images latin", "latin/000.png, or its caption, cannot be read: .*utf-8"),
        ("--images some --output_dir some/000.png", "--output_dir some/000.png is no folder that can be made"),
        ("--images some --encoding_cache_dir some/000.png", "--encoding_cache_dir some/000.png is no folder that can"),
        ("--images some --output_dir some", "--output_dir is the folder of --images"),
        ("--images drawn", "--images drawn is the folder above the pictures: give drawn/pictures"),
        ("--images some --metrics clip_i", "--metrics clip_i needs --reference"),
        ("--images some --metrics clip_directional", "--metrics clip_directional needs --originals"),
        ("--images some --reference some", "none of --metrics clip_score takes --reference"),
        ("--images bare", "--metrics clip_score takes captions, and .*bare/000.png has none"),
        (
            "--images some --compare few",
            "take pictures of the same names, and --compare has no 003",
        ),
        (
            "--images some --compare seeds",
            "seeds/00.* has the caption 'a red square', and some/00.*: draw both",
        ),
        (
            "--images torn",
            "torn/000.png has none: give a metadata.jsonl with columns file_name and text",
        ),
        ("--images some --metrics fid --reference some", "pip install torch-fidelity, or take kid"),
        (
            "--images some --metrics kid --reference some",
            "--metrics kid takes 20 pictures or more, and .* holds 4: give more",
        ),
        (
            "--images twenty --metrics frechet --reference twenty",
            "--metrics frechet takes 33 .* or take another metric",
        ),
        (
            "--images some --metrics cmmd --reference twenty",
            "--metrics cmmd takes 20 pictures or more, and .*images holds 4: give more",
        ),
        ("--images surrogate", r"surrogate/000.png, or its caption, cannot be read: must be text in UTF-8"),
        (
            "--images some --clip_model wordless",
            "--clip_model wordless cannot .* its tokenizer knows only 2 ",
        ),
        ("--images broken", "broken/001.png does not open as a picture"),
        ("--images some --clip_model some", "--clip_model some cannot be loaded as a CLIP"),
        ("--images some --metrics psnr", "invalid choice: 'psnr'"),
    ],
)
def test_refused(measure, tmp_path, capsys, flags, said):
    """A sentence that names the flag or the file, and nothing is written."""
    (tmp_path / "empty").mkdir()
    for name, count in (("some", 4), ("few", 3), ("twenty", 20), ("bare", 4), ("torn", 4), ("broken", 4)):
        save_squares(tmp_path / name, count)
    save_squares(tmp_path / "seeds", 4, text="a red square")
    (tmp_path / "bare" / "metadata.jsonl").unlink()
    (tmp_path / "torn" / "metadata.jsonl").write_text('{"file": "000.png"}\n')
    (tmp_path / "broken" / "001.png").write_bytes(b"torn")
    for name in ("alike", "latin"):
        save_squares(tmp_path / name, 2)
    shutil.copy(tmp_path / "alike" / "000.png", tmp_path / "alike" / "000.webp")
    save_squares(tmp_path / "blank", 2, text="")
    save_squares(tmp_path / "surrogate", 4, text="\ud800")
    save_squares(tmp_path / "drawn" / "pictures", 4)
    (tmp_path / "wordless").mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copy(CLIP / name, tmp_path / "wordless")
    save_squares(tmp_path / "sown", 4)
    rows = (tmp_path / "sown" / "metadata.jsonl").read_text()
    (tmp_path / "sown" / "metadata.jsonl").write_text(re.sub('"seed": 2', '"seed": 7', rows))
    (save_squares(tmp_path / "linked", 2) / "gone.png").symlink_to("nowhere")
    (save_squares(tmp_path / "deep", 2) / "metadata.jsonl").write_text("[" * 100_000)
    (tmp_path / "latin" / "metadata.jsonl").unlink()
    (tmp_path / "latin" / "000.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(SystemExit) as end:
        measure(*flags.split())
    assert re.search(said, f"{end.value} {capsys.readouterr().err}")
    assert not os.path.exists("evaluated/metrics.json")
