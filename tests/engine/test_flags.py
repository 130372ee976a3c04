"""The command line and the config file: what is taken, and what is refused in one sentence before anything loads."""

import re
import subprocess
import sys

import pytest
import yaml
from helpers import ROOT, metrics, run

import train_text_to_image as script


SWITCH = (True, False)
# Every flag with two values that it takes, neither of them the default (for a switch, the second is).
FLAGS = {
    "pretrained_model_name_or_path": ("owner/one", "owner/two"),
    "revision": ("one", "two"),
    "variant": ("fp16", "bf16"),
    "non_ema_revision": ("one", "two"),
    "cache_dir": ("one", "two"),
    "dataset_name": ("owner/one", "owner/two"),
    "dataset_config_name": ("one", "two"),
    "train_data_dir": ("pictures", "others"),
    "image_column": ("one", "two"),
    "caption_column": ("one", "two"),
    "max_train_samples": (1, 2),
    "repeats": (2, 3),
    "lr_num_cycles": (2, 3),
    "lr_power": (0.5, 2.0),
    "resolution": (256, 768),
    "center_crop": SWITCH,
    "random_flip": SWITCH,
    "image_interpolation_mode": ("bicubic", "nearest_exact"),
    "proportion_empty_prompts": (0.1, 1.0),
    "on_bad_image": ("skip", "error"),
    "encoding_cache_dir": ("one", "two"),
    "no_encoding_cache": SWITCH,
    "dataloader_num_workers": (1, 2),
    "output_dir": ("one", "two"),
    "overwrite_output_dir": SWITCH,
    "seed": (0, 2**64 - 1),
    "train_batch_size": (1, 2),
    "gradient_accumulation_steps": (2, 3),
    "num_train_epochs": (1, 2),
    "max_train_steps": (1, 2),
    "gradient_checkpointing": SWITCH,
    "mixed_precision": ("no", "bf16"),
    "allow_tf32": SWITCH,
    "deterministic": SWITCH,
    "torch_compile": SWITCH,
    "enable_xformers_memory_efficient_attention": SWITCH,
    "learning_rate": (1e-5, 0.5),
    "scale_lr": SWITCH,
    "lr_scheduler": ("cosine", "linear"),
    "lr_warmup_steps": (0, 10),
    "use_8bit_adam": SWITCH,
    "adam_beta1": (0.5, 0.8),
    "adam_beta2": (0.9, 0.99),
    "adam_weight_decay": (0.0, 0.1),
    "adam_epsilon": (1e-6, 1e-4),
    "max_grad_norm": (0.5, 2.0),
    "use_ema": SWITCH,
    "foreach_ema": SWITCH,
    "offload_ema": SWITCH,
    "pretrained_vae_model_name_or_path": ("owner/vae", "pictures"),
    "single_file_config": ("pictures", "owner/model"),
    "rescale_betas_zero_snr": SWITCH,
    "prediction_type": ("v_prediction", "sample"),
    "snr_gamma": (5.0, 1.0),
    "noise_offset": (0.1, 0.05),
    "input_perturbation": (0.1, 0.2),
    "dream_training": SWITCH,
    "dream_detail_preservation": (0.5, 2.0),
    "validation_prompts": (["a cat", "a dog"], ["one: two"]),
    "validation_prompt": ("a cat", "one: two"),
    "num_validation_images": (0, 2),
    "validation_samples": (1, 2),
    "validation_epochs": (1, 2),
    "validation_steps": (1, 2),
    "report_to": ("wandb", "none"),
    "tracker_project_name": ("one", "two"),
    "logging_dir": ("one", "two"),
    "checkpointing_steps": (0, 10),
    "checkpoints_total_limit": (1, 2),
    "resume_from_checkpoint": ("latest", "."),
    "push_to_hub": SWITCH,
    "hub_model_id": ("one", "owner/two"),
    "hub_token": ("one", "two"),
    "hub_private_repo": SWITCH,
}
for_each_flag = pytest.mark.parametrize("name", FLAGS)


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    """A working folder with two empty folders for pictures, and something for a base model in one file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("pictures", "others", "samples"):
        (tmp_path / name).mkdir()


def needed(name=None):
    """The flags that a run cannot do without, but for the one of this name and what excludes it."""
    model = "model.safetensors" if name == "single_file_config" else "owner/model"
    base = {"pretrained_model_name_or_path": model, "train_data_dir": "pictures"}
    excluded = {"dataset_name": "train_data_dir"}.get(name)
    return {flag: value for flag, value in base.items() if flag not in (name, excluded)}


def typed(flags):
    """Flags and values as one types them."""
    words = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words += [f"--{name}" if value else f"--no-{name}"]
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def written(flags, path="config.yaml"):
    """Writes a config file of flags, or of text as it is; returns the words that name it."""
    with open(path, "w") as file:
        file.write(flags if isinstance(flags, str) else yaml.safe_dump(flags))
    return ["--config", path]


def refusal(capsys, words):
    """The sentence in which a command line is refused, which is all that is said."""
    with pytest.raises(SystemExit) as end:
        script.parse_args(words)
    said = capsys.readouterr().err
    name, sentence = said.removesuffix("\n").split(": error: ")
    assert end.value.code == 2 and "\n" not in name + sentence
    assert "functools" not in sentence and " at 0x" not in sentence, "this shows the code, not the mistake"
    return sentence


# What is taken.


def test_flags_are_all_here():
    """The table above names every flag there is."""
    assert {*vars(script.parse_args(typed(needed())))} - {"config"} == {*FLAGS}


@for_each_flag
def test_typed(name):
    """A flag that is typed has the value that was typed, in its type."""
    for value in FLAGS[name]:
        args = script.parse_args(typed({**needed(name), name: value}))
        assert getattr(args, name) == value and type(getattr(args, name)) is type(value)


@for_each_flag
def test_config(name):
    """A flag in the config file is as one that is typed, and one that is typed wins over it."""
    in_file, on_command_line = FLAGS[name]
    args = script.parse_args(written({**needed(name), name: in_file}))
    assert getattr(args, name) == in_file and type(getattr(args, name)) is type(in_file)
    assert vars(args) == {**vars(script.parse_args(typed({**needed(name), name: in_file}))), "config": "config.yaml"}
    args = script.parse_args(written({**needed(name), name: in_file}) + typed({name: on_command_line}))
    assert getattr(args, name) == on_command_line


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("max_train_steps: '12'", "max_train_steps", 12),
        ("revision: 2", "revision", "2"),
        ("seed:", "seed", None),
        ("use_ema: off", "use_ema", False),
        ("use_ema: yes", "use_ema", True),
        ("output_dir: 0123", "output_dir", "0123"),
        ("resolution: 0064", "resolution", 64),
        ("revision: true", "revision", "true"),
        ("revision: 12:30", "revision", "12:30"),
        ("revision: 2026-01-01", "revision", "2026-01-01"),
        ("revision: 'null'", "revision", "null"),
        ("mixed_precision: no", "mixed_precision", "no"),
        ("hub_model_id: ''", "hub_model_id", ""),
        ("validation_prompts: [1, '- x', yes, 12:30, 0x1f, 1e3]", "validation_prompts", "1|- x|yes|12:30|0x1f|1e3"),
        ("validation_prompts: ['a: b', 'null', '', --seed=1]", "validation_prompts", "a: b|null||--seed=1"),
        ("validation_prompts: a cat", "validation_prompts", "a cat"),
        ("", "learning_rate", 1e-4),
        ("# only a comment", "learning_rate", 1e-4),
    ],
)
def test_config_value(text, name, value):
    """YAML's own reading of a value is not in the way."""
    args = script.parse_args(written(text) + typed(needed()))
    value = value.split("|") if name == "validation_prompts" else value
    assert getattr(args, name) == value and type(getattr(args, name)) is type(value)


def test_train_args_are_taken_back(tiny_model, pictures, tmp_path):
    """A run's train_args.yaml gives the same arguments, and with the seed it drew the same losses and file."""
    flags = {"pretrained_model_name_or_path": str(tiny_model), "train_data_dir": str(pictures), "resolution": 16}
    flags |= {"train_batch_size": 2, "num_train_epochs": 1, "lr_warmup_steps": 0, "center_crop": True}
    flags |= {"snr_gamma": 5.0, "hub_model_id": "1e5", "validation_prompts": ["a: b", "no"], "mixed_precision": "no"}
    run(script, *typed(flags), "--output_dir", "first")
    saved = yaml.safe_load((tmp_path / "first" / "train_args.yaml").read_text())
    args = script.parse_args(["--config", "first/train_args.yaml"])
    assert {name: value for name, value in vars(args).items() if name in saved} == saved
    assert saved.keys() == FLAGS.keys() - {"hub_token", "overwrite_output_dir", "resume_from_checkpoint"}
    assert {name: saved[name] for name in flags} == flags
    assert saved["max_train_steps"] is None and saved["seed"] is None  # as nothing was given
    text = (tmp_path / "first" / "train_args.yaml").read_text()
    assert "# torch 2." in text and "# max_train_steps: 3\n" in text
    (seed,) = re.findall(r"^# seed: (\d+)\n", text, re.MULTILINE)
    run(script, "--config", "first/train_args.yaml", "--output_dir", "second", "--seed", seed)
    assert metrics("second", "loss") == metrics("first", "loss")
    text = text.replace(f"# seed: {seed}\n", "").replace("seed: null\n", f"seed: {seed}\n")
    assert (tmp_path / "second" / "train_args.yaml").read_text() == text.replace(": first\n", ": second\n")


@pytest.mark.parametrize(
    "config, words, values",
    [
        ("validation_epochs: 3", "--validation_steps 7", (None, 7, None)),
        ("validation_steps: 7", "--validation_epochs=3", (3, None, None)),
        ("max_train_steps: 9", "--num_train_epochs 2", (5, None, None)),
        ("max_train_steps: 9", "--num_train_epochs 2 --max_train_steps 9", (5, None, 9)),
        ("max_train_steps: 9", "", (5, None, 9)),
        ("num_train_epochs: 9", "--max_train_steps 2", (5, None, 2)),
    ],
)
def test_other_words_win_over_the_config(config, words, values):
    """What the command line says replaces what the file says of the same thing under another name."""
    args = script.parse_args(written(config) + typed(needed()) + words.split())
    assert (args.validation_epochs, args.validation_steps, args.max_train_steps) == values


def test_no_pictures_of_a_prompt():
    """No pictures of --validation_prompt can be asked for, as of the reference; other prompts have theirs."""
    flags = {"validation_prompt": "a cat", "num_validation_images": 0, "validation_prompts": ["a dog"]}
    assert script.picture_prompts(script.parse_args(typed({**needed(), **flags}))) == ["a dog"]


def test_help_is_instant():
    """--help answers without loading any library but yaml."""
    command = [sys.executable, "-X", "importtime", ROOT / "train_text_to_image.py", "--help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "yaml" in loaded and "--resume_from_checkpoint" in done.stdout
    heavy = {"accelerate", "bitsandbytes", "datasets", "diffusers", "numpy", "PIL", "torch", "transformers", "wandb"}
    assert loaded & heavy == set()


def test_mistake_is_said_at_once():
    """A wrong flag is refused without loading any library, too."""
    command = [sys.executable, "-X", "importtime", ROOT / "train_text_to_image.py", *typed(needed()), "--resolution=5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and "error: --resolution 5" in done.stderr
    assert "torch" not in done.stderr.replace("torch.", "")


# What is refused.


@pytest.mark.parametrize(
    "text, says",
    [
        ("learning_rat: 1", "--learning_rat"),
        ("1: 2", "--1"),
        ("max_train_steps: many", "--max_train_steps"),
        ("max_train_steps: 1.5", "--max_train_steps"),
        ("max_train_steps: true", "max_train_steps"),
        ("max_train_steps: [1, 2]", "--max_train_steps"),
        ("max_train_steps: [1]", "--max_train_steps"),
        ("max_train_steps: {a: 1}", "max_train_steps"),
        ("max_train_steps: 0", "--max_train_steps"),
        ("learning_rate: -1", "--learning_rate"),
        ("learning_rate: .nan", "--learning_rate"),
        ("learning_rate: .inf", "--learning_rate"),
        ("learning_rate: false", "learning_rate"),
        ("revision: [main, 2]", "--revision"),
        ("revision: {main: 2}", "--revision"),
        ("revision: !env MAIN", "--revision"),
        ("revision: !!str [main]", "--revision"),
        ('revision: "\\0"', "--revision"),
        ("revision: one\nseed: 1\nrevision: two", "--revision is given twice"),
        ("revision: one\nrevision:", "--revision is given twice"),
        ("output_dir: {a: 1}", "--output_dir"),
        ("output_dir: ''", "--output_dir"),
        ("output_dir: ~/run", "home folder"),
        ("use_ema: 'true'", "use_ema"),
        ("use_ema: 1", "use_ema"),
        ("use_ema: []", "use_ema"),
        ("use_ema: [true]", "use_ema"),
        ("use_ema: !!bool maybe", "use_ema"),
        ("no-use_ema: true", "did you mean --use_ema?"),
        ("validation_prompts: []", "validation_prompts"),
        ("validation_prompts: [a cat, a dog: portrait]", "validation_prompts"),
        ("validation_prompts: [a cat, [a dog]]", "validation_prompts"),
        ("validation_prompts: [a cat, null]", "validation_prompts"),
        ("validation_prompts: [a cat, ]\nvalidation_prompt: [a]", "validation_prompt"),
        ("config: other.yaml", "--config"),
        ("help: true", "--help"),
        ("lr_scheduler: cosin", "--lr_scheduler"),
        ("mixed_precision: fp8", "--mixed_precision"),
        ("local_rank: 0", "local_rank"),
        ("? [a]\n: 1", "lines"),
        ("a: b: c", "line 1 is not YAML: mapping values are not allowed here"),
        ("just text", "lines"),
        ("- learning_rate\n- 1", "lines"),
        ("learning_rate: 1\nlearning_rate: [", "line 2 is not YAML"),
        ("learning_rate: \0", "cannot be read"),
        ("a: " + "[" * 3000, "cannot be read"),
    ],
)
def test_config_is_refused(capsys, text, says):
    """A mistake in the config file is refused by the file's name and the flag's."""
    sentence = refusal(capsys, written(text) + typed(needed()))
    assert sentence.startswith("--config config.yaml: ") and says in sentence


def test_config_is_checked(capsys):
    """What a config file says is checked against the other flags, too."""
    assert refusal(capsys, written("resolution: 500") + typed(needed())).startswith("--resolution 500 ")


@pytest.mark.parametrize("path", ["missing.yaml", ".", "latin1.yaml"])
def test_config_cannot_be_read(capsys, tmp_path, path):
    """A config file that is not there, is a folder or is no text is refused by its name."""
    (tmp_path / "latin1.yaml").write_bytes("revision: \xe9".encode("latin-1"))
    assert f"--config {path}: it cannot be read" in refusal(capsys, ["--config", path, *typed(needed())])


MISTAKES = [
    ("--resolution 500", "--resolution 500", "8"),
    ("--resolution 0", "--resolution", "1"),
    ("--learning_rate -0.5", "--learning_rate", "-0.5"),
    ("--learning_rate=-1e-4", "--learning_rate", "-1e-4"),
    ("--learning_rate nan", "--learning_rate", "nan"),
    ("--learning_rate inf", "--learning_rate", "inf"),
    ("--max_grad_norm 1e400", "--max_grad_norm", "1e400"),
    (f"--max_train_steps {10**30}", "--max_train_steps", str(10**30)),
    ("--learning_rate fast", "--learning_rate", "fast"),
    ("--train_batch_size 0", "--train_batch_size", "0"),
    ("--train_batch_size two", "--train_batch_size", "two"),
    ("--train_batch_size 1.5", "--train_batch_size", "1.5"),
    ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps", "0"),
    ("--max_train_steps -1", "--max_train_steps", "-1"),
    ("--snr_gamma -3", "--snr_gamma", "-3"),
    ("--snr_gamma 0", "--snr_gamma", "0"),
    ("--noise_offset nan", "--noise_offset", "nan"),
    ("--proportion_empty_prompts 1.5", "--proportion_empty_prompts", "1.5"),
    ("--adam_beta2 2", "--adam_beta2", "2"),
    ("--seed -1", "--seed", "-1"),
    (f"--seed {2**64}", "--seed", str(2**64)),
    ("--output_dir=", "--output_dir", "a path"),
    ("--output_dir=~/run", "--output_dir", "home folder"),
    ("--train_data_dir=", "--train_data_dir", "a path"),
    ("--pretrained_model_name_or_path=", "--pretrained_model_name_or_path", "a path"),
    ("--resume_from_checkpoint=", "--resume_from_checkpoint", "a path"),
    ("--logging_dir=", "--logging_dir", "a path"),
    ("--logging_dir /tmp", "--logging_dir /tmp", "tensorboard --logdir"),
    ("--lr_scheduler polynomial --learning_rate 1e-7", "--learning_rate", "1e-7"),
    ("--tracker_project_name ../../elsewhere", "--tracker_project_name ../../elsewhere", "--output_dir"),
    ("--tracker_project_name /tmp/x", "--tracker_project_name /tmp/x", "--output_dir"),
    ("--output_dir . --train_data_dir samples", "--train_data_dir samples", "samples that the run writes"),
    ("--logging_dir ../logs", "--logging_dir ../logs", "tensorboard --logdir"),
    ("--output_dir config.yaml", "--output_dir config.yaml", "no folder"),
    ("--output_dir config.yaml/run", "--output_dir config.yaml/run", "no folder"),
    ("--output_dir dangling", "--output_dir dangling", "no folder"),
    ("--output_dir dangling/run", "--output_dir dangling/run", "no folder"),
    ("--output_dir /proc/sys/run", "--output_dir /proc/sys/run", "no folder"),
    ("--encoding_cache_dir config.yaml", "config.yaml", "--no_encoding_cache"),
    ("--config=", "--config", "cannot be read"),
    ("--instance_prompt \udcff", "--instance_prompt", "unrecognized"),
    ("--validation_prompt \udcff", "--validation_prompt", "UTF-8"),
    ("--validation_prompts a \udcff", "--validation_prompts", "UTF-8"),
    ("--output_dir \udcff", "--output_dir", "UTF-8"),
    ("--checkpointing_steps -1", "--checkpointing_steps", "-1"),
    ("--validation_samples -1", "--validation_samples", "-1"),
    ("--lr_scheduler cosin", "--lr_scheduler", "cosine"),
    ("--image_interpolation_mode cubic", "--image_interpolation_mode", "bicubic"),
    ("--report_to printer", "--report_to", "tensorboard"),
    ("--prediction_type noise", "--prediction_type", "epsilon"),
    ("--validation_steps 2 --validation_epochs 1", "--validation_steps", "--validation_epochs"),
    ("--overwrite_output_dir --resume_from_checkpoint latest", "--overwrite_output_dir", "--resume_from_checkpoint"),
    ("--dream_training --prediction_type v_prediction", "--dream_training", "--prediction_type"),
    ("--resume_from_checkpoint nowhere", "--resume_from_checkpoint", "nowhere"),
    ("--resume_from_checkpoint checkpoint-best", "--resume_from_checkpoint", "checkpoint-best"),
    ("--learning 1e-4", "--learning", "unrecognized"),
    ("--max_train_step=5", "unrecognized argument --max_train_step:", "did you mean --max_train_steps?"),
    ("--local_rank 0", "--local_rank", "environment"),
    ("--local_rank=0", "--local_rank", "environment"),
    ("--train_data_dir nowhere", "--train_data_dir", "nowhere"),
    ("--train_data_dir config.yaml", "--train_data_dir", "config.yaml"),
    ("--dataset_name owner/data", "--train_data_dir", "--dataset_name"),
    ("--pretrained_model_name_or_path ./nowhere", "--pretrained_model_name_or_path", "./nowhere"),
    ("--pretrained_model_name_or_path /no/where", "--pretrained_model_name_or_path", "/no/where"),
    ("--pretrained_model_name_or_path a/b/c", "--pretrained_model_name_or_path", "a/b/c"),
    ("--validation_prompts", "--validation_prompts", "expected"),
]


@pytest.mark.parametrize("words, flag, what", MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_refused(capsys, words, flag, what):
    """A mistake on the command line is refused in one sentence that names the flag and what is wrong with it."""
    written("")
    sentence = refusal(capsys, typed(needed()) + words.split())
    assert len(sentence) < 320
    assert flag in sentence and what in sentence


@pytest.mark.parametrize("name", ["pretrained_model_name_or_path", "train_data_dir"])
def test_needed(capsys, name):
    """A flag that a run cannot do without is asked for by name."""
    assert f"--{name}" in refusal(capsys, typed(needed(name)))
    assert f"--{name}" in refusal(capsys, written({name: None}) + typed(needed(name)))


VALIDATED = "--validation_prompt", "--validation_prompts", "--validation_samples"


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"offload_ema": True}, "--offload_ema does nothing without --use_ema.\n"),
        ({"offload_ema": True, "use_ema": True}, ""),
        ({"dream_detail_preservation": 2.0}, "--dream_detail_preservation does nothing without --dream_training.\n"),
        ({"lr_num_cycles": 2}, "--lr_num_cycles does nothing without --lr_scheduler cosine_with_restarts.\n"),
        ({"lr_num_cycles": 2, "lr_scheduler": "cosine_with_restarts"}, ""),
        ({"lr_power": 1.0}, ""),
        ({"lr_warmup_steps": 0}, ""),
        ({"lr_warmup_steps": 5, "lr_scheduler": "linear"}, ""),
        ({"num_validation_images": 0}, ""),
        ({"validation_steps": 5}, f"--validation_steps does nothing without {' or '.join(VALIDATED)}.\n"),
        ({"validation_steps": 5, "validation_samples": 1}, ""),
        ({"hub_model_id": "me/model"}, "--hub_model_id does nothing without --push_to_hub.\n"),
    ],
)
def test_flags_that_do_nothing_are_told(capsys, flags, said):
    """What lacks the flag that it needs is told of, from a config too; the run starts, as nothing is wrong."""
    for words in (typed({**needed(), **flags}), written(flags) + typed(needed())):
        script.parse_args(words)
        assert capsys.readouterr().err == said


@pytest.mark.parametrize("flag", ["revision", "non_ema_revision"])
def test_a_revision_of_a_folder_is_refused(capsys, tmp_path, flag):
    """A folder has no revisions, so another state of it than asked for would be trained."""
    (tmp_path / "base").mkdir()
    base = {"pretrained_model_name_or_path": tmp_path / "base", flag: "main"}
    assert refusal(capsys, typed({**needed(), **base})).startswith(f"--{flag} is for the Hub, and {tmp_path}/base")


def test_the_usage_is_not_in_the_way():
    """A mistake is all that is said; the flags are listed for --help alone."""
    command = [sys.executable, ROOT / "train_text_to_image.py", "--max_train_step", "5", *typed(needed())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    says = "train_text_to_image.py: error: unrecognized argument --max_train_step: did you mean --max_train_steps?"
    assert done.stderr.splitlines() == [says]


# The token of the Hub.


@pytest.mark.parametrize(
    "text",
    [
        "hub_token: hf_secret: x",
        "hub_token: 'hf_secret",
        "hub_token: *hf_secret",
        "hub_token: *-hf_secret",
        "hub_token: !hf_secret!x y",
        "hub_token: &hf_secret &hf_secret x",
        "hub_token: %hf_secret",
        "hub_token: @hf_secret",
        "hub_token: [hf_secret]",
        "hub_token: {hf_secret: x}",
        "hub_token hf_secret",
        "hub_token=hf_secret",
        "hub_tokn: hf_secret",
    ],
)
def test_no_refusal_of_a_config_shows_the_token(capsys, text):
    """However the line of the token is wrong, its number is said, or its flag, and not what stands there."""
    sentence = refusal(capsys, written(f"seed: 1\n{text}\n") + typed(needed()))
    assert "secret" not in sentence and ("line" in sentence or "--hub_tok" in sentence)


@pytest.mark.parametrize("words", ["--hub_tokn hf_secret", "--hub_tokn=hf_secret", "--hub-token hf_secret"])
def test_no_refusal_of_the_command_line_shows_the_token(capsys, words):
    """Of flags that are unknown, their values are not said."""
    sentence = refusal(capsys, typed(needed()) + words.split())
    assert "secret" not in sentence and "did you mean --hub_token?" in sentence


@pytest.mark.parametrize("flag", ["--hub_token", "--hub_token:", "--push_to_hub="])
def test_no_token_without_its_blank_is_shown(capsys, flag):
    """A token that is glued to its flag is cut out of what is said."""
    token = "hf_" + "secret" * 5
    assert "secret" not in refusal(capsys, [*typed(needed()), flag + token])
    if ":" in flag:
        assert "secret" not in refusal(capsys, written(f"{flag[2:]}{token}:") + typed(needed()))


def test_a_folder_whose_name_begins_as_a_token_is_named(capsys):
    """Only what is as long as a token is cut out."""
    data = {"train_data_dir": "hf_pictures"}
    assert "hf_pictures" in refusal(capsys, typed({**needed(), **data}))


@pytest.mark.parametrize("words", ["--hub_token = hf_secret", "--hub_token x hf_secret", "--seed 1 hf_secret"])
def test_no_stray_word_is_shown(capsys, words):
    """A word that belongs to no flag may be a token."""
    sentence = refusal(capsys, typed(needed()) + words.split())
    assert "secret" not in sentence and "belongs to no flag" in sentence


@pytest.mark.parametrize("words", ["--hub_token hf_secret", "--hub_token=hf_secret"])
def test_a_token_on_the_command_line_is_warned_of(capsys, words):
    """One is told of better places for the token, in a line that does not hold it; a config file is one of them."""
    script.parse_args(typed(needed()) + words.split())
    (warning,) = capsys.readouterr().err.splitlines()
    assert "hf auth login" in warning and "HF_TOKEN" in warning and "secret" not in warning
    assert script.parse_args(written("hub_token: hf_secret") + typed(needed())).hub_token == "hf_secret"
    assert capsys.readouterr().err == ""


# Folders.


@pytest.mark.parametrize("home", [None, "/proc/sys"])
def test_no_home(capsys, monkeypatch, tmp_path, home):
    """Where no cache folder can be had, one is asked for; with one, or without a cache, no home is needed."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    if home:
        monkeypatch.setenv("HOME", home)
    else:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("os.getuid", lambda: 2**31 - 5)  # whom no line of passwd names
    sentence = refusal(capsys, typed(needed()))
    assert "--encoding_cache_dir" in sentence and "--no_encoding_cache" in sentence
    args = script.parse_args(typed({**needed(), "encoding_cache_dir": "cache"}))
    assert str(script.cache_folder(args)) == "cache"
    args = script.parse_args(typed({**needed(), "no_encoding_cache": True}))
    assert script.read_manifest(script.cache_folder(args) / "checked") == {}


def test_empty_cache_home(monkeypatch):
    """An empty XDG_CACHE_HOME counts as none."""
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/tmp/me")
    folder = script.cache_folder(script.parse_args(typed(needed())))
    assert str(folder) == "/tmp/me/.cache/diffusion-training"


def test_a_folder_that_goes_in_circles(capsys, tmp_path):
    """A link to itself is no folder to write to."""
    (tmp_path / "circle").symlink_to("circle")
    assert "--output_dir circle is no folder" in refusal(capsys, [*typed(needed()), "--output_dir", "circle"])


def test_a_name_too_long_for_a_disk(capsys):
    """What the system will not even look up is not there."""
    for flag in ("train_data_dir", "resume_from_checkpoint"):
        assert f"--{flag} " in refusal(capsys, [*typed(needed()), f"--{flag}", "a" * 300])
