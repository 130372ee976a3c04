"""What the documents say of the tests is so."""

import ast
import re
import tomllib

import pytest
from helpers import ROOT
from packaging.requirements import Requirement


def test_named_tests_exist():
    """Every test that a document names as `folder/file.py::name` is defined in that file."""
    documents = [(ROOT / "docs" / name).read_text() for name in ("defects.md", "gpu_path.md", "reliability.md")]
    named = {pair for text in documents for pair in re.findall(r"([\w/]+\.py)::(\w+)", text)}
    tests = ROOT / "tests"
    trees = {str(path.relative_to(tests)): ast.parse(path.read_text()) for path in tests.glob("*/test_*.py")}
    defined = {(file, node.name) for file, tree in trees.items() for node in tree.body if hasattr(node, "name")}
    assert len(named) > 50
    assert named - defined == set()


def requirements(name):
    """The lines of a file of requirements, without comments and other files."""
    lines = (ROOT / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-r"))]


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_scripts_name_their_requirements(path):
    """uv reads in a script, as PEP 723 has it, what requirements.txt lists; the docstring stays first."""
    source = path.read_text()
    block = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    (found,) = re.finditer(block, source)
    told = tomllib.loads("".join(line[2:] for line in found["content"].splitlines(keepends=True)))
    assert found["type"] == "script" and told.pop("requires-python") == ">=3.11,<3.15"
    assert told == {"dependencies": requirements("requirements.txt")}
    assert source.startswith('"""')


def test_exact_versions_are_within_the_ranges():
    """What `make` installs is what requirements.txt asks for, each in a version of its range."""
    ranges = {each.name: each.specifier for each in map(Requirement, requirements("requirements.txt"))}
    exact = dict(line.split("==") for line in requirements("requirements-exact.txt"))
    assert exact.keys() == ranges.keys() and all(ranges[name].contains(exact[name]) for name in exact)


def test_named_files_exist():
    """What the documents name in demo/, docs/, configs/ and tools/ is there, and nothing is left to fill in."""
    documents = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "Makefile",
        *sorted((ROOT / "docs").glob("*.md")),
    ]
    named = set()
    for path in documents:
        text = path.read_text()
        assert "@@" not in text, path.name
        folders, endings = "demo|docs|configs|tools|benchmarks", "py|png|md|txt|yaml"
        named |= set(re.findall(rf"(?<![\w/])(?:{folders})/[\w/]+\.(?:{endings})\b", text))
    assert len(named) > 20
    assert {name for name in named if not (ROOT / name).exists()} == set()
