"""The scripts' shape: fences are alike and ask for no more than they list, functions are short, args stay as given."""

import ast
import builtins
import os
import re
import shutil
import subprocess
import symtable
import sys

import pytest
from helpers import ROOT

from tools import sync


PROGRAMS = sync.find_scripts(ROOT)
SCRIPTS = [path for path in PROGRAMS if "Engine" in sync.find_fences(path.read_text())]  # that train
# Which scripts have which fences.
PAIRS = {"train_controlnet.py", "train_instruct_pix2pix.py"}
FAMILIES = {"textual_inversion.py", "train_dreambooth.py", "train_lora.py", "train_text_to_image.py", *PAIRS}
FENCES = {
    "Stable Diffusion's flags": FAMILIES,
    "Data sets": {"train_lora.py", "train_text_to_image.py", "train_unconditional.py", *PAIRS},
    "Prior preservation": {"train_dreambooth.py", "train_lora.py"},
    "Training flags": {*FAMILIES, "train_unconditional.py"},
    "Flags": {path.name for path in PROGRAMS},
    "Kohya's format": {"train_lora.py", "export.py"},
    "Results": {"generate.py", "export.py"},
    "Programs": {"generate.py", "evaluate.py"},
    "Stable Diffusion": FAMILIES,
    "Engine": {*FAMILIES, "train_unconditional.py"},
    "Files and signals": {path.name for path in PROGRAMS} - {"export.py"},
}

for_each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
for_each_program = pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)


# The tool.


FENCED = """import math


def own():
    return shared(1)


# === First: the same in both ===
def shared(x):
    return math.sqrt(x)


# === End of first ===
# === Second thing: the same in both ===
LIMIT = 3
# === End of second thing ===
"""


@pytest.fixture
def pair(tmp_path):
    """Two scripts with the same fences and halves of their own."""
    (tmp_path / "one.py").write_text(FENCED)
    (tmp_path / "two.py").write_text(FENCED.replace("shared(1)", "shared(2)"))
    return tmp_path


def found(folder):
    """What the tool finds in a folder's scripts."""
    return sync.differences({path.name: path.read_text() for path in sync.find_scripts(folder)})


def test_fences_are_found(pair):
    assert sync.find_fences(FENCED) == {"First": (7, 12), "Second thing": (13, 15)}
    assert sync.fence_text(FENCED, "Second thing").splitlines()[1] == "LIMIT = 3"
    assert found(pair) == []


@pytest.mark.parametrize(
    "old, new", [("sqrt", "cbrt"), ("    return", "    # Why.\n    return"), ("both ===", "two ===")]
)
def test_a_changed_fence_is_found_and_mended(pair, old, new):
    """Any byte counts, the comments' and the marks' too; copying mends it and leaves the own half alone."""
    two = pair / "two.py"
    head, body = two.read_text().split("# === First", 1)
    two.write_text(head + "# === First" + body.replace(old, new, 1))
    (problem,) = found(pair)
    assert problem.startswith("First differs:") and "two.py" in problem
    assert sync.copy_fence("First", pair / "one.py") == [two]
    assert found(pair) == [] and "shared(2)" in two.read_text()


def test_a_fence_in_one_script_is_no_difference(pair):
    two = pair / "two.py"
    two.write_text(two.read_text().split("# === Second")[0])
    assert found(pair) == [] and sync.copy_fence("Second thing", pair / "one.py") == []


@pytest.mark.parametrize(
    "broken, message",
    [
        ("# === A: x ===\n# === B: x ===\n# === End of b ===\n", "B begins in A"),
        ("# === A: x ===\n# === End of b ===\n", "b ends where A is open"),
        ("# === A: x ===\n", "A does not end"),
        ("# === A: x ===\n# === End of a ===\n" * 2, "A begins in a second place"),
    ],
)
def test_broken_marks_are_refused(broken, message):
    with pytest.raises(ValueError, match=message):
        sync.find_fences(broken)


def test_the_command(pair):
    """Without arguments it prints the differences and fails; with a title and a script it copies."""

    def tool(*arguments):
        command = [sys.executable, pair / "tools" / "sync.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=pair)

    (pair / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "sync.py", pair / "tools")
    (pair / "two.py").write_text(FENCED.replace("LIMIT = 3", "LIMIT = 4"))
    assert tool().returncode == 1 and "-LIMIT = 3" in tool().stdout
    assert tool("Third", "one.py").returncode == 2
    assert tool("Second thing", "one.py").stdout == "two.py has changed\n"
    assert tool().returncode == 0


# The fences of the scripts.


def references(text):
    """The module-level names that a text refers to."""

    def visit(table):
        own = {s.get_name() for s in table.get_symbols() if s.is_referenced()}
        if table.get_type() != "module":
            own = {name for name in own if table.lookup(name).is_global()}
        return own.union(*map(visit, table.get_children()))

    return visit(symtable.symtable(text, "fence", "exec"))


def definitions(text):
    """The statements of a text by the top-level names that they define, imports aside."""
    names = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = node
        elif not isinstance(node, (ast.Import, ast.ImportFrom)):
            stored = [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
            names.update(dict.fromkeys(stored, node))
    return names


def imported(source):
    """The names that a script's top-level imports bind."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {alias.asname or alias.name.split(".")[0] for node in nodes for alias in node.names}


def listed_hooks(text):
    """The hooks that a fence's first lines list: their arguments by name, None for a constant."""
    head = text.split("\n\n")[0]
    found = re.findall(r"^#   (\w+)(?:\((.*?)\))?(?: -> .*)?$", head, flags=re.MULTILINE)
    return {name: [word.strip() for word in words.split(",")] if words else None for name, words in found}


def outside(source, title):
    """What a fence refers to that is not its own, of a fence below it, imported or built in."""
    fences = sync.find_fences(source)
    below = [sync.fence_text(source, other) for other in fences if fences[other] >= fences[title]]
    known = imported(source) | set(dir(builtins)) | {"__file__", "__name__", "__doc__"}
    known = known.union(*(definitions(text) for text in below))
    return references(sync.fence_text(source, title)) - known


def test_fences_are_alike():
    assert found(ROOT) == []


@for_each_program
def test_fences_take_the_hooks_that_they_list(path):
    """A fence's first lines list all that it takes from above, and nothing that it does not take."""
    source = path.read_text()
    for title in sync.find_fences(source):
        assert outside(source, title) == set(listed_hooks(sync.fence_text(source, title))), title


@for_each_program
def test_hooks_are_defined_as_listed(path):
    """Each script has each hook, above the fence that lists it, with the arguments that stand in the list."""
    source, defined = path.read_text(), definitions(path.read_text())
    for title, (first, _) in sync.find_fences(source).items():
        for name, arguments in listed_hooks(sync.fence_text(source, title)).items():
            node = defined[name]
            assert node.lineno <= first, f"{name} stands below what takes it"
            if arguments is None:
                assert isinstance(node, (ast.Assign, ast.AugAssign)), name
            else:
                assert [argument.arg for argument in node.args.args] == arguments, name


def test_the_flags_need_no_more_than_they_list():
    """With the least that the flags' hooks may do, arguments are parsed, and refused where they are wrong."""
    source = (ROOT / "train_text_to_image.py").read_text()
    least = """
REFUSED = {}
NEEDS = {}
DEFAULTS = {
    "output_dir": "out",
    "learning_rate": 1.0,
    "train_batch_size": 1,
    "num_train_epochs": 1,
    "validation_steps": 1,
    "tracker_project_name": "x",
}


def add_flags(parser):
    parser.add_argument("--pretrained_model_name_or_path")
    parser.add_argument("--resolution", type=int)


def check_flags(args):
    return []


"""
    imports = source[source.index("import argparse") : source.index("# This script's flags")]
    names = {"__name__": "method", "__doc__": "A method."}
    exec(imports + least + sync.fence_text(source, "Training flags") + sync.fence_text(source, "Flags"), names)
    args = names["parse_args"](["--resolution", "16"])
    assert (args.output_dir, args.num_train_epochs, args.max_train_steps, args.validation_epochs) == (
        "out",
        1,
        None,
        None,
    )
    open_to_none = {name for name, value in vars(args).items() if value is None}
    assert open_to_none & {"learning_rate", "train_batch_size", "lr_scheduler", "logging_dir"} == set()
    with pytest.raises(SystemExit):
        names["parse_args"](["--resolution", "17"])


def test_a_new_need_of_a_fence_is_found():
    """A fence that takes a name of the own half without listing it, or lists one that it does not take, is found."""
    source = (ROOT / "train_text_to_image.py").read_text()
    taken = source.replace("    progress_bar.close()\n", "    progress_bar.close()\n    unet_targets()\n")
    assert outside(taken, "Engine") - set(listed_hooks(sync.fence_text(taken, "Engine"))) == {"unet_targets"}
    listed = source.replace("#   after_step(run, models)\n", "#   after_step(run, models)\n#   unused(run)\n")
    assert set(listed_hooks(sync.fence_text(listed, "Engine"))) - outside(listed, "Engine") == {"unused"}


@for_each_program
def test_fences_of_a_program(path):
    """Each has those that are listed above, in that order, and calls main last."""
    source = path.read_text()
    assert list(sync.find_fences(source)) == [title for title in FENCES if path.name in FENCES[title]]
    assert ast.unparse(ast.parse(source).body[-1]) == "if __name__ == '__main__':\n    main(args)"


@for_each_script
def test_layout(path):
    """Docstring, flags, the method, the engine; train is the first that the engine defines."""
    source = path.read_text()
    tree, fences = ast.parse(source), sync.find_fences(source)
    assert "To read it" in ast.get_docstring(tree)
    functions = [n.name for n in ast.parse(sync.fence_text(source, "Engine")).body if isinstance(n, ast.FunctionDef)]
    assert functions[0] == "train" and functions[-1] == "main"
    method = source.splitlines()[fences["Flags"][1] + 1 :]
    assert "def compute_loss(models, batch, args):" in method


# Lines and functions.


@for_each_program
def test_functions_are_short(path):
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    lengths = {function.name: function.end_lineno - function.lineno + 1 for function in functions}
    assert {name: length for name, length in lengths.items() if length > 100} == {}


@for_each_program
def test_functions_say_what_they_do(path):
    """Each top-level function and class has a docstring."""
    nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert [node.name for node in nodes if not ast.get_docstring(node)] == []


@for_each_program
def test_one_statement_a_line(path):
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.stmt)]
    lines = [node.lineno for node in nodes]
    assert sorted({line for line in lines if lines.count(line) > 1}) == []


def writes_to_args(source):
    """What a script does to its arguments once they are parsed: assignments, setattr, updates of their dictionary."""
    parsed = sync.find_fences(source)["Flags"][1] + 1
    writes = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, (ast.Store, ast.Del)):
            owner = ast.unparse(node.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            owner = ast.unparse(node.args[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".update", ".pop", ".setdefault")):
            owner = ast.unparse(node.func.value)
        else:
            continue
        if re.search(r"\bargs\b", owner) and node.lineno > parsed:
            writes.append(f"{node.lineno}: {ast.unparse(node)}")
    return writes


@for_each_script
def test_args_stay_as_given(path):
    """Once they are parsed, nothing writes to the arguments."""
    assert writes_to_args(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    ["args.seed = 1", "run.args.seed += 1", "setattr(args, 'seed', 1)", "vars(args)['seed'] = 1", "del args.seed"]
    + ["run.args.__dict__.update(seed=1)", "vars(args).pop('seed')"],
)
def test_a_write_to_args_is_found(line):
    source = (ROOT / "train_text_to_image.py").read_text()
    last = "    share = run.checkpoint_seconds"
    assert len(writes_to_args(source.replace(last, f"    {line}\n{last}"))) == 1


@for_each_program
def test_imports_nothing_of_ours(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    ours = {path.stem for path in PROGRAMS} | {"benchmarks", "demo", "tests", "tools"}
    assert {name.split(".")[0] for name in names} & ours == set()


@for_each_program
def test_copied_alone_answers_help(path, tmp_path):
    shutil.copy(path, tmp_path)
    command = [sys.executable, path.name, "--help"]
    out = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=20).stdout
    assert "--output_dir" in out or path.name == "export.py"
    assert os.listdir(tmp_path) == [path.name]
