"""The flags of train_lora.py: its two ways, whose captions, what is refused; and what a run publishes and prints."""

import re

import datasets
import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers import KOHYA, LORA, flags_of, in_epochs, make_pictures, run

import train_lora as script


FLAGS = ("--max_train_steps", 3, "--learning_rate", 1e-2)


# The two ways.


@pytest.mark.parametrize("way", [0, 1])
def test_defaults_of_the_ways(tiny_model, pictures, tmp_path, monkeypatch, capsys, way):
    """Each way has its defaults, as the reference's two scripts have them, and says them; a given flag wins."""
    wanted = [
        dict(
            learning_rate=1e-4, train_batch_size=16, num_train_epochs=100, validation_epochs=1, caption_column="text"
        ),
        dict(learning_rate=5e-4, train_batch_size=4, num_train_epochs=1, validation_epochs=50, caption_column=None),
    ][way]
    wanted["output_dir"] = ("sd-model-finetuned-lora", "lora-dreambooth-model")[way]
    wanted["tracker_project_name"] = ("text2image-fine-tune", "dreambooth-lora")[way]
    data = (["--train_data_dir"], ["--instance_prompt", "a sks", "--instance_data_dir"])[way]
    flags = ["--pretrained_model_name_or_path", str(tiny_model), *data, str(pictures)]
    args = script.parse_args(flags)
    assert {name: getattr(args, name) for name in wanted} == wanted
    given = {"learning_rate": 0.5, "train_batch_size": 3, "output_dir": "mine", "caption_column": "text"}
    args = script.parse_args([*flags, *(word for name, v in given.items() for word in (f"--{name}", str(v)))])
    assert {name: getattr(args, name) for name in given} == given
    assert script.parse_args([*flags, "--validation_steps", "5"]).validation_epochs is None
    monkeypatch.chdir(tmp_path)
    run(script, *flags, "--max_train_steps", 1, "--train_batch_size", 1, "--resolution", 16, "--report_to", "none")
    said = capsys.readouterr().out
    unused = ("train_batch_size", "num_train_epochs")  # as other flags are given
    assert all(f"{name} {v}" in said for name, v in wanted.items() if v is not None and name not in unused)
    assert "None" not in re.search("^way .*", said, re.MULTILINE)[0]
    assert (tmp_path / wanted["output_dir"] / LORA).exists() and "train_batch_size 1," in said


class Stopped(Exception):
    """Ends a run where it would begin to train."""


@pytest.mark.parametrize("prior, epoch", [(False, 3 * 6), (True, 20)])
def test_epochs_of_a_subject(tiny_model, pictures, tmp_path, monkeypatch, prior, epoch):
    """An epoch is --repeats passes over six pictures, or one over the class if that is longer."""
    resolved = []

    def stop(begun, *rest):
        resolved.append(begun)
        raise Stopped

    monkeypatch.setattr(script, "fill_cache", stop)
    flags = ("--instance_prompt", "sks", "--num_train_epochs", 2, "--validation_epochs", 1, "--repeats", 3)
    if prior:
        made = make_pictures(tmp_path / "class", count=20)
        flags += (
            "--with_prior_preservation",
            "--class_data_dir",
            made,
            "--class_prompt",
            "a",
            "--num_class_images",
            20,
        )
    with pytest.raises(Stopped):
        run(script, *in_epochs(flags_of(tiny_model, pictures, tmp_path / "out", *flags)))
    assert (resolved[0].max_train_steps, resolved[0].validation_steps) == (2 * epoch / 2, epoch / 2)


def captions_of(model, *flags):
    """The captions of the pictures that the flags name, in order."""
    argv = [str(flag) for flag in ("--pretrained_model_name_or_path", model, *flags)]
    return [record["captions"] for record in script.read_records(script.parse_args(argv))]


def test_captions_of_a_subject(tiny_model, tmp_path, hub):
    """Pictures without captions have --instance_prompt, in a folder, in parquet files and on the Hub."""
    folder = make_pictures(tmp_path / "folder", count=3)
    (folder / "metadata.jsonl").unlink()
    (folder / "001.txt").write_text("a sks in snow")
    (folder / "urls.parquet").write_bytes(b"passed over, as there are pictures")
    prompt = ("--instance_prompt", "a sks")
    wanted = [["a sks"], ["a sks in snow"], ["a sks"]]
    for flag in ("--instance_data_dir", "--train_data_dir"):
        assert captions_of(tiny_model, flag, folder, *prompt) == wanted
    images = [{"bytes": file.read_bytes(), "path": None} for file in sorted(folder.glob("*.*g"))]
    columns = {"image": images, "text": [None, "a sks in snow", " "]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    (tmp_path / "parquet").mkdir()
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "parquet" / "train.parquet")
    hub.add_folder("datasets/me/subject", tmp_path / "parquet")
    for source in (("--instance_data_dir", tmp_path / "parquet"), ("--dataset_name", "me/subject")):
        assert captions_of(tiny_model, *source, *prompt, "--caption_column", "text") == wanted
        assert captions_of(tiny_model, *source, *prompt) == [["a sks"]] * 3
    with pytest.raises(SystemExit, match="--caption_column wrong is not among"):
        captions_of(tiny_model, "--dataset_name", "me/subject", *prompt, "--caption_column", "wrong")


# Flags.


MISTAKES = [
    ("--dataset_name me/data", "--train_data_dir, --dataset_name and --instance_data_dir"),
    ("--instance_data_dir {data}", "--train_data_dir, --dataset_name and --instance_data_dir"),
    ("- --dataset_name me/data --instance_data_dir {data} --instance_prompt sks", "--instance_data_dir"),
    ("-", "--train_data_dir, --dataset_name and --instance_data_dir"),
    ("- --instance_data_dir {data}", "--instance_prompt"),
    ("- --instance_data_dir nowhere --instance_prompt sks", "--instance_data_dir nowhere is not a folder"),
    ("--with_prior_preservation --class_data_dir other --class_prompt dog", "--instance_prompt"),
    ("--instance_prompt sks --with_prior_preservation --class_prompt dog", "--class_data_dir"),
    ("--instance_prompt sks --with_prior_preservation --class_data_dir other", "--class_prompt"),
    ("--instance_prompt sks --class_data_dir other", "--with_prior_preservation"),
    ("--instance_prompt sks --class_prompt dog", "--with_prior_preservation"),
    ("--instance_prompt sks --with_prior_preservation --class_prompt dog --class_data_dir {data}/class", "may lie in"),
    ("--instance_prompt sks --with_prior_preservation --class_prompt dog --class_data_dir {data}/..", "may lie in"),
    ("--train_text_encoder --pre_compute_text_embeddings", "--pre_compute_text_embeddings"),
    ("--text_encoder_lr 1e-5", "--train_text_encoder"),
    ("--optimizer prodigy --use_8bit_adam", "--use_8bit_adam"),
    ("--optimizer prodigy --train_text_encoder --text_encoder_lr 1", "--text_encoder_lr"),
    ("--optimizer prodigy --scale_lr", "--scale_lr"),
    ("--optimizer prodigy --learning_rate 1e-4", "--learning_rate"),
    ("--rank 0", "--rank"),
    ("--lora_alpha 0", "--lora_alpha"),
    ("--lora_dropout 1", "--lora_dropout"),
    ("--lora_target_modules", "--lora_target_modules"),
    ("--optimizer sgd", "--optimizer"),
    ("--tokenizer_name other", "--tokenizer_name"),
    ("--do_edm_style_training", "--do_edm_style_training: it is for Playground v2.5"),
    ("--debug_loss", "--debug_loss: "),
    ("--enable_npu_flash_attention", "--enable_npu_flash_attention: "),
    ("--prodigy_decouple=maybe", "--prodigy_decouple: must be true or false, not maybe"),
    ("--prodigy_decouple=[", "--prodigy_decouple: must be true or false, not ["),
    *(
        (f"{flag} 1", f"{flag}: it is for DeepFloyd IF")
        for flag in sorted(script.REFUSED)
        if "IF" in script.REFUSED[flag]
    ),
]


@pytest.mark.parametrize("words, says", MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_with_adapters_is_refused(capsys, tiny_model, pictures, words, says):
    """A mistake is refused in one sentence that names the flag."""
    data = [] if words.startswith("-") and words[1:2] in ("", " ") else ["--train_data_dir", str(pictures)]
    words = words.format(data=pictures).split()
    argv = ["--pretrained_model_name_or_path", str(tiny_model), *data, *words[not data :]]
    with pytest.raises(SystemExit) as end:
        script.parse_args(argv)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert end.value.code == 2 and says in said and len(said) < 320


@pytest.mark.parametrize(
    "words, config, wanted",
    [
        ("", "", True),
        ("--prodigy_decouple", "", True),
        ("--prodigy_decouple=False", "", False),
        ("--prodigy_decouple false --seed 1", "", False),
        ("", "prodigy_decouple: false", False),
        ("--prodigy_decouple", "prodigy_decouple: false", True),
        ("--prodigy_decouple=no", "prodigy_decouple: true", False),
    ],
)
def test_yes_or_no(tiny_model, pictures, tmp_path, words, config, wanted):
    """A flag that is on unless told otherwise is turned off as the reference's is, or by a plain no or false."""
    (tmp_path / "config.yaml").write_text(config)
    argv = ["--config", str(tmp_path / "config.yaml"), "--pretrained_model_name_or_path", str(tiny_model)]
    args = script.parse_args([*argv, "--train_data_dir", str(pictures), *words.split()])
    assert args.prodigy_decouple is wanted and args.prodigy_safeguard_warmup is True


# What it leaves.


def test_what_is_published_of_adapters(tiny_model, pictures, tmp_path, monkeypatch, hub):
    """Both files, the card and the pictures are uploaded, none of which names a folder of this machine."""
    monkeypatch.setattr(script, "SAMPLER_STEPS", 2)
    monkeypatch.chdir(tmp_path)
    flags = ("--push_to_hub", "--hub_token", "hf_x", "--output_kohya_format", "--train_text_encoder")
    flags += ("--validation_prompt", "red", "--num_validation_images", 1, "--validation_steps", 3)
    run(script, *flags_of(tiny_model, pictures, "it", *FLAGS, *flags))
    (files,) = [repo["files"] for repo in hub.repos.values()]
    assert files.keys() - {".gitattributes"} == {
        "README.md",
        LORA,
        KOHYA,
        *(f"samples/step-00000{i}.png" for i in (0, 3)),
    }
    for name, data in files.items():
        assert str(tmp_path).encode() not in data and str(tiny_model.parent).encode() not in data, name
        assert b"hf_x" not in data
    card = files["README.md"].decode()
    assert "\n- lora\n" in card and "| rank | 4 |" in card and "from_pretrained('tiny')" in card
    assert re.search(r"load_lora_weights\('[\w/]*it'\)", card)


@pytest.mark.parametrize("model", ["tiny_model", "tiny_sdxl_model"])
def test_the_printed_code_loads_adapters(model, request, pictures, tmp_path, monkeypatch, capsys):
    """The lines at the end of a run load base and adapters, from any folder, and draw a picture."""
    monkeypatch.chdir(tmp_path)
    base = request.getfixturevalue(model)
    run(script, *flags_of(base, pictures, "it", *FLAGS))
    card = (tmp_path / "it" / "README.md").read_text()  # its code is for others, who have no such folders
    assert "load_lora_weights('it')" in card and str(base.parent) not in card and str(tmp_path) not in card
    code = re.search(
        r"^import diffusers\n.*?\.save\('picture.png'\)$", capsys.readouterr().out, re.DOTALL | re.MULTILINE
    )[0]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    exec(code.replace("width=32", "width=32, num_inference_steps=2"), {})
    assert (tmp_path / "elsewhere" / "picture.png").exists()


def test_nothing_is_said_of_flags_that_were_not_given(tiny_model, pictures, capsys):
    """A way fills in defaults of its own; of these none is told to do nothing."""
    flags = ["--pretrained_model_name_or_path", str(tiny_model), "--train_data_dir", str(pictures)]
    script.parse_args(flags)
    assert capsys.readouterr().err == ""
    script.parse_args([*flags, "--validation_epochs", "3"])
    assert capsys.readouterr().err.startswith("--validation_epochs does nothing without")


def test_the_lines_that_load_it_name_the_variant(tiny_model, pictures, tmp_path, capsys):
    """Without it nothing would be loaded."""
    model = tmp_path / "model"
    StableDiffusionPipeline.from_pretrained(tiny_model).to(torch.float16).save_pretrained(model, variant="fp16")
    run(script, *flags_of(model, pictures, tmp_path / "out", *FLAGS))
    code = capsys.readouterr().out.split("To load it:")[1]
    assert f"from_pretrained('{model}', variant='fp16')" in code
    exec(code[: code.index("prompt = ")], {})
