"""What no script may spoil: arguments are taken back, nothing is written among its pictures, libraries are few."""

import argparse
import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers import ENVIRONMENT, ROOT, flags_of, make_picture, metrics, run
from hypothesis import given, settings
from hypothesis import strategies as st

import train_lora
import train_text_to_image


OPTIONAL = ("bitsandbytes", "datasets", "prodigyopt")  # that a run can do without unless a flag asks for them
NEEDED = {
    "textual_inversion": "--train_data_dir {data} --placeholder_token <new> --initializer_token a",
    "train_controlnet": "--train_data_dir {data}",
    "train_dreambooth": "--instance_data_dir {data} --instance_prompt sks",
    "train_instruct_pix2pix": "--train_data_dir {data}",
    "train_lora": "--instance_data_dir {data} --instance_prompt sks",
    "train_text_to_image": "--train_data_dir {data}",
    "train_unconditional": "--train_data_dir {data}",
}


# What any flag may be given, and what is left out, as it would be refused beside others.

LOOKALIKES = "null yes no on 1e3 0x1f 0123 12:30 1_000 .inf ~ - = << *a &a !a a:b @x 2026-01-01 --output_dir=x".split()
LOOKALIKES += ["", " ", "- x", "a: b", "# x", "{a: 1}", "[a", "'", '"', "\\", "a\nb\n", "\t", "\r", "\x85", "\u2028"]
# Of an equals sign and two dashes, argparse takes the dashes for the end of the flags.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")).filter(lambda text: text != "--")
TEXT |= st.sampled_from(LOOKALIKES)
NAME = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), max_size=15)
PATHS = ("_dir", "_or_path")  # of folders that are there
ALWAYS = {"pretrained_model_name_or_path", "train_data_dir", "instance_data_dir", "instance_prompt"}
ALWAYS |= {"placeholder_token", "initializer_token", "with_prior_preservation", "class_data_dir", "class_prompt"}
ALWAYS |= {"validation_prompts"}
ONE_OF = [
    {"train_data_dir", "instance_data_dir", "dataset_name"},
    {"pretrained_model_name_or_path", "model_config_name_or_path"},
    {"validation_epochs", "validation_steps", "save_images_epochs"},
    {"num_train_epochs", "num_epochs"},
    {"report_to", "logger"},
    {"noise_offset", "offset_noise"},
    {"prediction_type", "dream_training", "rescale_betas_zero_snr"},
    {"train_text_encoder", "pre_compute_text_embeddings"},
    {"use_dora", "output_kohya_format"},
    {"optimizer", "use_8bit_adam", "scale_lr", "learning_rate", "text_encoder_lr"},
    {"lr_scheduler", "learning_rate"},
]


def flags_of_parser(script):
    """A script's flags by their names."""
    parser = argparse.ArgumentParser(add_help=False)
    script.add_flags(parser)
    script.add_common_flags(parser)
    script.add_saving_flags(parser)
    actions = {action.option_strings[0].removeprefix("--"): action for action in parser._actions}
    # Of these, two need a Hub id as the base, one a file and one a checkpoint.
    alone = {"revision", "non_ema_revision", "single_file_config", "resume_from_checkpoint"}
    alone |= {"edited_image_column"}  # says the same as another
    return {name: action for name, action in actions.items() if name not in alone}


def values_of(name, action):
    """What a flag may be given."""
    limits = getattr(action.type, "keywords", {})
    if name == "val_image_url_or_path":
        return st.just(__file__)
    if name == "with_prior_preservation":
        return st.just(True)
    if name == "resolution":
        return st.integers(1, 1000).map(lambda number: 8 * number)
    if action.choices:
        return st.sampled_from(sorted(action.choices))
    if action.nargs in (0, "?"):
        return st.booleans()
    if limits:
        kind = {int: st.integers, float: st.floats}[limits["kind"]]
        return kind(limits["low"], limits.get("high", sys.float_info.max))
    if name.endswith(PATHS):
        return NAME.map(lambda text: f"{text}.{name}")
    if name == "tracker_project_name":
        return NAME.map(lambda text: f"{text}.")
    if name == "placeholder_token":
        return TEXT.filter(lambda text: len(text.split()) == 1)
    text = TEXT.filter(bool) if name in ("dataset_name", "instance_prompt", "class_prompt") else TEXT
    return st.lists(text, min_size=1) if action.nargs == "+" else text


@st.composite
def given_flags(draw, actions):
    """Some of a script's flags with values, as a config file would have them."""
    names = draw(st.sets(st.sampled_from(sorted(actions)), min_size=30)) | (ALWAYS & {*actions})
    for either in ONE_OF:
        if rivals := sorted(either & names):
            names -= {*rivals} - {draw(st.sampled_from(rivals))}
    names -= set() if "train_text_encoder" in names else {"text_encoder_lr"}
    names -= set() if "train_data_dir" in names else {"conditioning_data_dir"}
    if "validation_image" in actions:  # these come back as prompts, one for each picture
        names -= {"validation_prompt", "num_validation_images"}
    names |= {"val_image_url_or_path"} & {*actions} if {"validation_prompt", "validation_prompts"} & names else set()
    flags = {name: draw(values_of(name, actions[name])) for name in sorted(names)}
    if "validation_image" in actions:
        flags["validation_image"] = [__file__] * len(flags["validation_prompts"])
    if not flags.get("train_text_encoder"):
        flags.pop("text_encoder_lr", None)
    return flags


def typed(flags):
    """Flags as words of the command line."""
    switches = {True: "--{}", False: "--no-{}"}
    return [
        switches[value].format(name)
        if isinstance(value, bool) and not name.startswith("prodigy")
        else f"--{name}={value[0] if isinstance(value, list) else value}"
        for name, value in flags.items()
    ]


@pytest.mark.parametrize("name", NEEDED)
def test_every_script_takes_its_arguments_back(tmp_path, monkeypatch, name):
    """Whatever flags say comes back by way of train_args.yaml, from a config as from the command line."""
    script = importlib.import_module(name)
    actions = flags_of_parser(script)
    paths = {flag for flag in actions if flag.endswith(PATHS)} - {"overwrite_output_dir", "val_image_url_or_path"}
    monkeypatch.chdir(tmp_path)

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(given_flags(actions))
    def come_back(flags):
        for flag in flags.keys() & paths:
            Path(flags[flag]).mkdir(exist_ok=True)
        Path("config.yaml").write_text(yaml.safe_dump(flags))
        args = script.parse_args(["--config", "config.yaml"])
        if flags.pop("offset_noise", False):
            flags["noise_offset"] = 0.1
        assert {flag: getattr(args, actions[flag].dest) for flag in flags} == flags
        if all(len(value) == 1 for value in flags.values() if isinstance(value, list)):  # else one may be -x
            assert vars(script.parse_args(typed(flags))) == vars(args) | {"config": None}
        script.write_train_args(SimpleNamespace(args=args, settings=dict))
        again = script.parse_args([f"--config={args.output_dir}/train_args.yaml"])
        assert vars(again) | {flag: getattr(args, flag) for flag in script.UNSAVED} == vars(args)

    come_back()


@pytest.mark.parametrize("name", NEEDED)
def test_what_flags_need_is_there(name):
    """Each flag that needs another one is a flag of the script, and so is that, with the value it should have."""
    script = importlib.import_module(name)
    actions = {action.dest: action for action in flags_of_parser(script).values()}
    for flag, needed in (script.COMMON_NEEDS | script.NEEDS).items():
        for words in needed.split(" or "):
            other, *values = words.split()
            assert flag in actions and other in actions and {*values} <= {*(actions[other].choices or ())}


@pytest.mark.parametrize("name", NEEDED)
def test_output_among_the_pictures_is_refused(tiny_model, pictures, name, capsys):
    """A run's samples would be trained on, so no script writes into its own data."""
    words = [*NEEDED[name].format(data=pictures).split(), "--pretrained_model_name_or_path", str(tiny_model)]
    with pytest.raises(SystemExit):
        importlib.import_module(name).parse_args([*words, "--output_dir", f"{pictures}/../{pictures.name}/out"])
    assert "--output_dir lies in" in capsys.readouterr().err


@pytest.mark.parametrize("name", NEEDED)
def test_a_base_in_the_output_folder_is_refused(tiny_model, pictures, tmp_path, name, capsys):
    """No script writes over the base that it reads, whichever of the two folders lies in the other."""
    words = [*NEEDED[name].format(data=pictures).split(), "--pretrained_model_name_or_path", str(tiny_model)]
    for out in (tiny_model, tiny_model / "new", tiny_model.parent):
        with pytest.raises(SystemExit):
            importlib.import_module(name).parse_args([*words, "--output_dir", str(out)])
        assert f"--pretrained_model_name_or_path {tiny_model} would be overwritten" in capsys.readouterr().err
    importlib.import_module(name).parse_args([*words, "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize("name", ["train_dreambooth", "train_lora"])
def test_class_pictures_that_overwriting_would_delete(tiny_model, pictures, tmp_path, name, capsys):
    """Class pictures in the output folder are refused where --overwrite_output_dir deletes, and only there."""
    words = [*NEEDED[name].format(data=pictures).split(), "--pretrained_model_name_or_path", str(tiny_model)]
    words += ["--output_dir", str(tmp_path), "--with_prior_preservation", "--class_prompt", "a"]
    words += ["--class_data_dir", str(tmp_path / "samples" / "class")]
    importlib.import_module(name).parse_args(words)
    with pytest.raises(SystemExit):
        importlib.import_module(name).parse_args([*words, "--overwrite_output_dir"])
    assert "--class_data_dir lies in --output_dir" in capsys.readouterr().err


def test_a_config_in_the_output_folder_is_refused(pictures, tmp_path, capsys):
    """The config of a new UNet is not written over either."""
    words = ["--train_data_dir", str(pictures), "--model_config_name_or_path", str(tmp_path)]
    with pytest.raises(SystemExit):
        importlib.import_module("train_unconditional").parse_args([*words, "--output_dir", str(tmp_path)])
    assert "--model_config_name_or_path" in capsys.readouterr().err


@pytest.mark.parametrize("name", NEEDED)
def test_optional_libraries_are_not_imported_first(name):
    """What not every machine can install is imported only where a flag asks for it."""
    names = [node for node in ast.parse((ROOT / f"{name}.py").read_text()).body if "Import" in type(node).__name__]
    modules = {alias.name for node in names for alias in node.names} | {
        getattr(node, "module", None) for node in names
    }
    assert "torch" in modules and not modules & {*OPTIONAL}


@pytest.mark.launch
def test_a_run_without_optional_libraries(tiny_model, pictures, tmp_path):
    """A run trains where none of them is installed, and notes the versions of the others."""
    flags = flags_of(tiny_model, pictures, tmp_path / "out")
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({OPTIONAL})); sys.argv = {['train_lora.py', *flags]}; "
    )
    code += f"runpy.run_path({str(ROOT / 'train_lora.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(metrics(tmp_path / "out", "loss")) == 4
    notes = (tmp_path / "out" / "train_args.yaml").read_text()
    assert "# diffusers 0" in notes and not any(f"# {name}" in notes for name in OPTIONAL)


def test_a_missing_library_is_named(tiny_model, pictures, tmp_path, monkeypatch, capsys):
    """If a flag asks for a library that is not installed, one sentence says how to get it, and nothing is written."""
    for name in OPTIONAL:
        monkeypatch.setitem(sys.modules, name, None)
    flags = flags_of(tiny_model, pictures, tmp_path / "out")
    with pytest.raises(SystemExit, match=r"^--use_8bit_adam [^\n]*: pip install bitsandbytes$"):
        run(train_text_to_image, *flags, "--use_8bit_adam")
    with pytest.raises(SystemExit):
        run(train_lora, *flags, "--optimizer", "prodigy", "--learning_rate", 1)
    assert "pip install prodigyopt" in capsys.readouterr().err
    rows = make_picture(tmp_path / "rows" / "a.png").rename(tmp_path / "rows" / "a.parquet").parent
    with pytest.raises(SystemExit, match=r"pip install datasets"):
        run(train_text_to_image, *flags, "--train_data_dir", rows)
    assert [path.name for path in (tmp_path / "out").glob("*")] in ([], [".lock"])


PROGRAMS = {  # some flags of each, as a file has them and as words
    "generate": ({"model": ["a", "b"], "lora_scale": [0.5, 1], "seed": 3, "vae_tiling": True}, []),
    "evaluate": ({"images": "{folder}", "metrics": ["kid"], "reference": "{folder}", "batch_size": 4}, []),
    "export": ({"dtype": "fp16", "lora_scale": 0.5, "use_ema": True}, ["a", "b"]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_take_files_of_flags(name, tmp_path, monkeypatch, capsys):
    """The three that do not train read --config as the others do: a typed flag wins, a wrong one is named."""
    monkeypatch.chdir(tmp_path)
    flags, words = PROGRAMS[name]
    folder = tmp_path / "pictures"
    for number in range(20):
        make_picture(folder / f"{number}.png")
    flags = {flag: str(folder) if value == "{folder}" else value for flag, value in flags.items()}
    program = importlib.import_module(name)
    Path("flags.yaml").write_text(yaml.safe_dump(flags))
    args = program.parse_args([*words, "--config", "flags.yaml"])
    assert {flag: getattr(args, flag) for flag in flags} == flags
    last = [*flags][-1]
    typed = [f"--no-{last}"] if flags[last] is True else [f"--{last}", "5"]
    assert getattr(program.parse_args([*words, "--config", "flags.yaml", *typed]), last) in (False, 5)
    for wrong, said in (("no_such_flag: 1", "unrecognized argument --no_such_flag"), ("[", "line 1 is not YAML")):
        Path("flags.yaml").write_text(wrong)
        with pytest.raises(SystemExit):
            program.parse_args([*words, "--config", "flags.yaml"])
        assert f"error: --config flags.yaml: {said}" in capsys.readouterr().err
