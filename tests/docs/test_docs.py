"""What the documents say of the tests is so."""

import ast
import re

from helpers import ROOT


def test_named_tests_exist():
    """Every test that a document names as `folder/file.py::name` is defined in that file."""
    documents = [(ROOT / "docs" / name).read_text() for name in ("defects.md", "reliability.md")]
    named = {pair for text in documents for pair in re.findall(r"([\w/]+\.py)::(\w+)", text)}
    tests = ROOT / "tests"
    trees = {str(path.relative_to(tests)): ast.parse(path.read_text()) for path in tests.glob("*/test_*.py")}
    defined = {(file, node.name) for file, tree in trees.items() for node in tree.body if hasattr(node, "name")}
    assert len(named) > 50
    assert named - defined == set()
