"""What the documents say of the tests is so."""

import ast
import re

from conftest import ROOT


def test_named_tests_exist():
    """Every test that docs/deviations.md names as `file.py::name` is defined in that file."""
    named = set(re.findall(r"(\w+\.py)::(\w+)", (ROOT / "docs" / "deviations.md").read_text()))
    trees = {path.name: ast.parse(path.read_text()) for path in ROOT.glob("tests/test_*.py")}
    defined = {(file, node.name) for file, tree in trees.items() for node in tree.body if hasattr(node, "name")}
    assert len(named) > 50
    assert named - defined == set()
