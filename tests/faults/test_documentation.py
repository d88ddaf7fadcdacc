"""docs/faults.md names for every fault a test that exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_page_of_faults_names_exists() -> None:
    page = (ROOT / "docs" / "faults.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 20
    missing = [(file, test) for file, test in named if test not in functions(ROOT / file)]
    assert missing == []
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| fault")]
    assert [row for row in rows if "::test_" not in row and not row.endswith("| the same |")] == []


def functions(path: Path) -> set[str]:
    """The functions of a file."""
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
