"""The scripts stay alike: same name, same code; same flag, same meaning; and each stands on its own."""

import argparse
import ast
import functools
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

from tools import sync


SCRIPTS = sync.find_scripts()
MAIN = ROOT / "train_text_to_image.py"

# Non-blank lines, as ruff formats them.
BUDGETS = {
    "train_text_to_image.py": 1310,
    "train_lora.py": 1540,
    "train_dreambooth.py": 1355,
    "textual_inversion.py": 1315,
    "train_unconditional.py": 1100,
}
# One name of every section, in the order of the sections.
SECTIONS = [
    "read_config",
    "parse_args",
    "read_records",
    "Samples",
    "load_models",
    "encode_prompts",
    "snr_weights",
    "compute_loss",
    "log_validation",
    "save_checkpoint",
    "load_checkpoint",
    "write_model_card",
    "publish",
    "train",
    "main",
]
# The defaults that differ from train_text_to_image.py: {"flag": {"script.py": default}}
DEFAULTS = {
    "--adam_beta1": {"train_unconditional.py": 0.95},
    "--adam_weight_decay": {"train_unconditional.py": 1e-6},
    "--caption_column": {"train_lora.py": None},  # None: see WAYS in train_lora.py
    "--learning_rate": {"train_dreambooth.py": 5e-6, "train_lora.py": None},
    "--lr_scheduler": {"train_unconditional.py": "cosine"},
    "--no-random_flip": {"textual_inversion.py": True},
    "--num_train_epochs": {"textual_inversion.py": None, "train_dreambooth.py": 1, "train_lora.py": None},
    "--output_dir": {
        "textual_inversion.py": "text-inversion-model",
        "train_dreambooth.py": "dreambooth-model",
        "train_lora.py": None,
        "train_unconditional.py": "ddpm-model-64",
    },
    "--random_flip": {"textual_inversion.py": True},
    "--repeats": {"train_lora.py": 1},
    "--resolution": {"train_unconditional.py": 64},
    "--tracker_project_name": {
        "textual_inversion.py": "textual_inversion",
        "train_dreambooth.py": "dreambooth",
        "train_lora.py": None,
        "train_unconditional.py": "train_unconditional",
    },
    "--train_batch_size": {"train_dreambooth.py": 4, "train_lora.py": None},
    "--validation_steps": {"train_dreambooth.py": 100},
}
# The flags that a script can do without, though train_text_to_image.py cannot.
OPTIONAL = {("--pretrained_model_name_or_path", "train_unconditional.py")}

for_each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)


# The rules of tools/sync.py.


def test_same_name_same_code():
    assert sync.problems({path.name: path.read_text() for path in SCRIPTS}) == []


ONE = """
import math

LIMIT = 3

# Shared.
@staticmethod
def double(x: float) -> float:
    return 2 * math.sqrt(x) * LIMIT


def loss(x: float) -> float:
    return double(x)


def only_here():
    return 1
"""
TWO = ONE.replace("return double(x)", "return double(x) + 1").split("\n\n\ndef only_here")[0] + "\n"


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Two synthetic scripts that keep the rules."""
    monkeypatch.setattr(sync, "SHARED", {"LIMIT", "double"})
    monkeypatch.setattr(sync, "HOOKS", {"loss"})
    monkeypatch.setattr(sync, "PRIVATE", {"one.py": {"only_here"}})
    (tmp_path / "one.py").write_text(ONE)
    (tmp_path / "two.py").write_text(TWO)
    return tmp_path


def found(folder):
    return sync.problems({path.name: path.read_text() for path in sync.find_scripts(folder)})


def change(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_checker_accepts(pair):
    assert found(pair) == []


@pytest.mark.parametrize(
    "old, new",
    [
        ("2 * math", "3 * math"),
        ("# Shared.", "# Shared, said otherwise."),
        ("@staticmethod\n", ""),
        ("x: float) -> float:\n    return 2", "x: int) -> float:\n    return 2"),
        ("LIMIT = 3", "LIMIT = 4"),
    ],
)
def test_changed_copy_is_found_and_repaired(pair, old, new):
    change(pair / "two.py", old, new)
    (problem,) = found(pair)
    assert problem.startswith("two.py: ") and "differs" in problem
    sync.copy_names(["LIMIT", "double"], pair / "one.py")
    assert found(pair) == []
    assert (pair / "one.py").read_text() == ONE and (pair / "two.py").read_text() == TWO


@pytest.mark.parametrize(
    "old, new, problem",
    [
        ("LIMIT = 3", "LIMIT = 3\nOTHER = 4", "two.py: OTHER must stand in exactly one set"),
        ("LIMIT = 3", "LIMIT = 3\nif LIMIT:\n    OTHER = 4", "two.py: OTHER must stand in exactly one set"),
        ("LIMIT = 3", "LIMIT = 3\nonly_here = 1", "two.py: only_here must stand in exactly one set"),
        ("def loss(x: float)", "def loss(x: int)", "two.py: loss has another signature than in one.py"),
        ("import math", "import cmath", "two.py: double refers to math, which is neither"),
    ],
)
def test_broken_rule_is_found(pair, old, new, problem):
    change(pair / "two.py", old, new)
    (message,) = found(pair)
    assert message.startswith(problem)


def test_shared_text_uses_no_private_name(pair):
    for path in (pair / "one.py", pair / "two.py"):
        change(path, "2 * math", "only_here() * math")
    assert [p for p in found(pair) if p.startswith("one.py: double refers to only_here")]


def test_set_entry_without_script_is_found(pair):
    sync.SHARED.add("gone")
    sync.PRIVATE["two.py"] = {"gone_too"}
    assert [p.split()[0] for p in found(pair)] == ["gone", "gone_too"]


def test_fixer_refuses_hooks(pair):
    with pytest.raises(SystemExit, match="loss is not a shared name"):
        sync.copy_names(["loss"], pair / "one.py")


# The shape of each script.


def lines_of(text):
    return sum(bool(line.strip()) for line in text.splitlines())


@for_each_script
def test_budget(path):
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", path.name, "-"]
    formatted = subprocess.run(command, input=path.read_text(), cwd=ROOT, check=True, capture_output=True, text=True)
    assert lines_of(formatted.stdout) <= BUDGETS[path.name]


@for_each_script
def test_functions_are_short(path):
    lines = path.read_text().splitlines()
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    lengths = {f.name: lines_of("\n".join(lines[f.lineno - 1 : f.end_lineno])) for f in functions}
    assert {name: length for name, length in lengths.items() if length > 100} == {}


@for_each_script
def test_one_statement_a_line(path):
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.stmt)]
    lines = [node.lineno for node in nodes]
    assert sorted({line for line in lines if lines.count(line) > 1}) == []


@for_each_script
def test_section_order(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    order = list(sync.definitions(path.read_text()))
    sections = [name for name in order if name in SECTIONS]
    assert sections == [name for name in SECTIONS if name in order]
    reference = [name for name in sync.definitions(MAIN.read_text()) if name in order]
    assert [name for name in order if name in reference] == reference
    assert ast.unparse(tree.body[-1].test) == "__name__ == '__main__'"


@for_each_script
def test_imports_nothing_of_ours(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    ours = {path.stem for path in SCRIPTS} | {"benchmarks", "demo", "tests", "tools"}
    assert {name.split(".")[0] for name in names} & ours == set()


@for_each_script
def test_copied_alone_answers_help(path, tmp_path):
    shutil.copy(path, tmp_path)
    command = [sys.executable, path.name, "--help"]
    out = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=20).stdout
    assert "--output_dir" in out
    assert os.listdir(tmp_path) == [path.name]


# Flags and commands.


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
    first = {}
    problems = []
    used = set()
    for path in sorted(SCRIPTS, key=lambda path: path != MAIN):
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
                script, other, default = first.setdefault(flag, (path.name, meaning, action.default))
                for key in meaning:
                    if meaning[key] != other[key]:
                        problems.append(f"{flag}: {key} is {meaning[key]} in {path.name}, {other[key]} in {script}")
                if action.default != default:
                    used.add((flag, path.name))
                    if DEFAULTS.get(flag, {}).get(path.name, default) != action.default:
                        problems.append(f"{flag}: undeclared default {action.default} in {path.name}")
    assert problems == []
    assert used == {(flag, script) for flag, scripts in DEFAULTS.items() for script in scripts}


def commands_in(text):
    """(script, arguments) of every call of one of our scripts in the ```bash blocks of a Markdown text."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            names = [os.path.basename(word) for word in words]
            script = next((name for name in names if name in BUDGETS), None)
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


DOCUMENTS = [path for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))] if path.exists()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documented_commands_parse(path, tmp_path, monkeypatch):
    for name in ("configs", "demo"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for script, arguments in commands_in(path.read_text()):
        for flag, value in zip(arguments, arguments[1:], strict=False):
            # Folders that the reader has; what lies in the repository must be there.
            if flag.endswith("_dir") and not value.startswith(("/", "configs/", "demo/")):
                os.makedirs(value, exist_ok=True)
            if value.endswith("/train_args.yaml"):  # of an earlier run
                os.makedirs(os.path.dirname(value), exist_ok=True)
                shutil.copy(ROOT / "configs" / "demo_text_to_image.yaml", value)
        importlib.import_module(script.removesuffix(".py")).parse_args(arguments)
