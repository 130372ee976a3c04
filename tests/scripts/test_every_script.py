"""What no script may spoil: arguments are taken back, nothing is written among its pictures, libraries are few."""

import ast
import importlib
import subprocess
import sys

import pytest
import yaml
from helpers import ENVIRONMENT, ROOT, flags_of, make_picture, metrics, run

import train_lora
import train_text_to_image


OPTIONAL = ("bitsandbytes", "datasets", "prodigyopt")  # that a run can do without unless a flag asks for them
NEEDED = {
    "textual_inversion": "--train_data_dir {data} --placeholder_token <new> --initializer_token a",
    "train_dreambooth": "--instance_data_dir {data} --instance_prompt sks",
    "train_lora": "--instance_data_dir {data} --instance_prompt sks",
    "train_text_to_image": "--train_data_dir {data}",
    "train_unconditional": "--train_data_dir {data}",
}


@pytest.mark.parametrize("name", NEEDED)
def test_every_script_takes_its_arguments_back(tiny_model, pictures, tmp_path, name):
    """What a run saves as train_args.yaml gives the same arguments, for each script."""
    sibling = importlib.import_module(name)
    words = NEEDED[name].format(data=pictures).split()
    args = sibling.parse_args([*words, "--pretrained_model_name_or_path", str(tiny_model)])
    saved = {flag: value for flag, value in vars(args).items() if flag not in sibling.UNSAVED}
    (tmp_path / "train_args.yaml").write_text(yaml.safe_dump(saved))
    again = sibling.parse_args(["--config", str(tmp_path / "train_args.yaml")])
    assert {flag: value for flag, value in vars(again).items() if flag in saved} == saved


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
    assert not (tmp_path / "out").exists()
