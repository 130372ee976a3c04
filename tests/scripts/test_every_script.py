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
