"""docs/operations.md: its commands run as they stand on a running appliance, the codes it explains are real."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.appliance import ROOT, Appliance
from tests.e2e.documents import blocks, typed

PAGE = "docs/operations.md"


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.mark.timeout(600)  # two dozen commands, each a Python of its own, on a machine that may be busy
def test_the_commands_of_the_page_run_as_they_stand(appliance: Appliance, folder: Path) -> None:
    pages_commands = blocks(PAGE, "bash")
    assert sum(block.count("cloister ") for block in pages_commands) > 25
    for commands in pages_commands:
        done = typed(commands, folder, CLOISTER_HOME=str(appliance.home))
        assert done.returncode == 0, done.stdout + done.stderr
    assert [d["name"] for d in appliance.status()["deployments"]] == ["notes"], "the page leaves what it found"


def test_every_code_that_the_page_explains_is_one_the_code_knows() -> None:
    """SQLite's own, a switch of the build, and those made of a role or a kind of file, are spelled nowhere."""
    codes = set(re.findall(r"\b[A-Z]{2,}(?:_[A-Z]+)+\b", (ROOT / PAGE).read_text()))
    made = {"WORKER_DIED", "TEXT_DIED", "FILE_DIGEST_MISMATCH", "WEIGHTS_DIGEST_MISMATCH", "CLOISTER_HOME"}
    made |= {"CLOISTER_KERNELS"}
    sources = "".join(
        path.read_text()
        for folder in ("appliance", "engine", "bundles", "kernels")
        for path in (ROOT / folder).rglob("*.py")
    )
    unknown = {c for c in codes - made if not re.search(f'"{c}[":]', sources) and not c.startswith("SQLITE_")}
    assert unknown == set()
