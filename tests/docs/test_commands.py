"""The same flag means the same in every script, and the documents' commands parse."""

import argparse
import ast
import functools
import importlib
import os
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path

import pytest
from helpers import ROOT
from PIL import Image

from tools.sync import find_fences, find_scripts


PROGRAMS = sorted(find_scripts(ROOT), key=lambda path: (path.name != "train_text_to_image.py", path.name))
SCRIPTS = [path for path in PROGRAMS if "Engine" in find_fences(path.read_text())]  # that train
# The flags that a script can do without, though train_text_to_image.py cannot.
OPTIONAL = {("--pretrained_model_name_or_path", "train_unconditional.py")}
NAMES = {path.name for path in PROGRAMS}
# A script that takes several prompts where others take one.
SEVERAL = {("--validation_prompt", "train_controlnet.py")}
# What is no flag of all is declared by each script, with a default of its own.
OWN = {"resolution"}


def parser_of(script, monkeypatch):
    """The argument parser that a script's parse_args builds."""
    seen = []
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda self, file=None: seen.append(self))
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args(["--help"])
    monkeypatch.undo()
    return seen[0]


def kind_of(function):
    """What tells one converter from another: its name, and the settings that it was made with."""
    if isinstance(function, functools.partial):
        return function.func.__name__, str(function.keywords)
    return getattr(function, "__name__", None)


def test_same_flag_same_meaning(monkeypatch):
    """It has the same type, choices and help everywhere; another default stands in the script's own table."""
    first = {}
    problems = []
    for path in SCRIPTS:
        script = importlib.import_module(path.stem)
        own_defaults = {*script.DEFAULTS, *getattr(script, "WAYS", ())}
        own_defaults |= {other for name, other in script.REPLACES.items() if name in own_defaults}
        for action in parser_of(path.stem, monkeypatch)._actions:
            meaning = {
                "dest": action.dest,
                "type": kind_of(action.type),
                "action": type(action),
                # What a help ends on in parentheses is each script's own, such as the default that a mode gives.
                "help": re.sub(r" \([^()]*\)$", "", action.help or ""),
                **{key: getattr(action, key) for key in ("nargs", "const", "choices", "required")},
            }
            for flag in action.option_strings:
                meaning["required"] |= (flag, path.name) in OPTIONAL
                if (flag, path.name) in SEVERAL:
                    meaning["nargs"] = None
                origin, other, default = first.setdefault(flag, (path.name, meaning, action.default))
                for key in meaning:
                    if meaning[key] != other[key]:
                        problems.append(f"{flag}: {key} is {meaning[key]} in {path.name}, {other[key]} in {origin}")
                if action.default != default and action.dest not in own_defaults | OWN:
                    problems.append(f"{flag}: undeclared default {action.default} in {path.name}")
    assert problems == []


def test_defaults_are_of_flags(monkeypatch):
    """What stands in a script's table of defaults is a flag of it."""
    for path in SCRIPTS:
        script = importlib.import_module(path.stem)
        flags = {action.dest for action in parser_of(path.stem, monkeypatch)._actions}
        assert {*script.DEFAULTS, *getattr(script, "WAYS", ())} <= flags, path.name


def commands_in(text):
    """(script, arguments) of every call of one of our scripts in the ```bash blocks of a Markdown text."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            names = [os.path.basename(word) for word in words]
            script = next((name for name in names if name in NAMES), None)
            runs = any(name.startswith(("python", "accelerate", "torchrun")) for name in names)
            if script and runs:
                arguments = words[names.index(script) + 1 :]
                ends = [i for i, word in enumerate(arguments) if re.fullmatch(r"[|&;]+|\d?>.*", word)]
                yield script, arguments[: min(ends, default=None)]


def test_commands_in():
    text = """```bash
WANDB_MODE=offline torchrun --nproc_per_node 2 train_lora.py --rank 4 \\
  --validation_prompt "a cat" 2>&1 | tee log  # two processes
pip install -r requirements.txt
cp train_lora.py elsewhere
```
```python
python train_lora.py
```
"""
    assert list(commands_in(text)) == [("train_lora.py", ["--rank", "4", "--validation_prompt", "a cat"])]


def documented():
    """All commands of README, of docs/ and of the scripts' docstrings: (where, script, arguments)."""
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]:
        for script, arguments in commands_in(path.read_text()):
            yield path.name, script, arguments
    for path in PROGRAMS:
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        commands = re.search(r"^    (accelerate launch|python) .*", docstring, flags=re.DOTALL | re.MULTILINE)[0]
        for script, arguments in commands_in(f"```bash\n{commands}\n```"):
            yield path.name, script, arguments


COMMANDS = list(documented())


def save_drawn(folder):
    """Saves what evaluate.py takes: pictures with captions."""
    os.makedirs(folder, exist_ok=True)
    for i in range(20):
        Image.new("RGB", (8, 8)).save(Path(folder, f"{i}.png"))
        Path(folder, f"{i}.txt").write_text("a cat")


def test_commands_are_found():
    """Else nothing below would be tried."""
    counts = Counter(where for where, *_ in COMMANDS)
    assert counts["README.md"] >= 10 and counts["recipes.md"] >= 4 and counts["cluster.md"] >= 5, counts
    assert all(counts[path.name] >= 3 for path in PROGRAMS), counts


@pytest.mark.parametrize("where, script, arguments", COMMANDS)
def test_documented_commands_parse(where, script, arguments, tmp_path, monkeypatch):
    """A command of the documents is taken as it stands, once its folders are there."""
    for name in ("configs", "demo"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for flag, value in zip(arguments, arguments[1:], strict=False):
        # Folders that the reader has; what lies in the repository must be there.
        if flag.endswith("_dir") and not value.startswith(("/", "configs/", "demo/")):
            os.makedirs(value, exist_ok=True)
        if flag in ("--image", "--validation_image", "--val_image_url_or_path"):
            Image.new("RGB", (8, 8)).save(value)
        if flag == "--prompts":
            Path(value).write_text('{"prompt": "a cat"}\n')
        if flag in ("--images", "--compare", "--reference") and script == "evaluate.py":
            save_drawn(value)
        if value.endswith("/train_args.yaml"):  # of an earlier run
            os.makedirs(os.path.dirname(value), exist_ok=True)
            name = Path(script).stem.removeprefix("train_")
            shutil.copy(ROOT / "configs" / f"demo_{name}.yaml", value)
            for pairs in ("outlines", "edits"):  # which programs of the demo draw
                os.makedirs(f"outputs/{pairs}", exist_ok=True)
    importlib.import_module(script.removesuffix(".py")).parse_args(arguments)
