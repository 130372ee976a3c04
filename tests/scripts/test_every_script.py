"""What each script's own flags must not spoil: arguments are taken back, and no script writes among its pictures."""

import importlib

import pytest
import yaml


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
