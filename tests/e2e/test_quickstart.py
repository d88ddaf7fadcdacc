"""docs/quickstart-client.md: its blocks run as they stand, and its table of codes is the code's."""

import ast
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.appliance import ROOT, Appliance
from tests.e2e.documents import blocks, typed

PAGE = "docs/quickstart-client.md"
# Where a call of a tenant passes, and what of it can raise an error that the tenant is told: FOLDER, FILE or
# FILE::FUNCTION.
ROADS = (
    *("appliance/gateway", "appliance/control/admission", "appliance/client/sync.py", "appliance/client/aio.py"),
    *(
        "appliance/client/credentials.py",
        "appliance/control/identity/callers.py",
        "appliance/control/deployments.py::ready",
        "appliance/control/db/database.py",
    ),
    *("appliance/control/audit/errors.py", "appliance/control/refusal.py", "appliance/policy.py"),
    *("engine/text", "engine/loop.py", "engine/request.py", "engine/scheduler.py", "engine/runner.py"),
    *("engine/worker/service.py", "engine/worker/translate.py"),
)
RAISING = {"CloisterError", "EngineError", "_unauthenticated", "_refuse", "_forbid", "ResultRow"}
NOT_TOLD = {
    "AUDIT_EXISTS": "only init",
    "AUDIT_IN_USE": "only the start of control",
    "CREDENTIALS_EXIST": "only `cloister key issue`",
    "DUPLICATE_HANDLE": "the gateway numbers its requests itself",
    "FILE_TOO_LARGE": "only the loading of a model",
    "INVALID_OUTCOME": "only a gateway's defect",
    "INVALID_PARAMETERS": "only a gateway's defect",
    "INVALID_TYPE_IDS": "engine-text makes them",
    "LISTEN_FAILED": "only the start of the gateway",
    "NOT_INITIALISED": "only the start of the gateway",
    "POLICY_INCOMPLETE": "only a start",
    "ROLE_REQUIRED": "an operator's call",
    "TASK_UNSUPPORTED": "control asks no model for what it does not answer",
    "TEMPLATE_INVALID": "only the loading of a model",
    "TEMPLATE_MISSING": "control asks no model for what it does not answer",
    "TICKET_INVALID": "the gateway authorizes again",
    "TOKENIZER_INVALID": "only the loading of a model",
    "TOKENIZER_MISSING": "only the loading of a model",
}


@pytest.fixture
def folder(appliance: Appliance) -> Iterator[Path]:
    """Where a reader sits: a directory with the credentials in it."""
    path = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp"))
    shutil.copytree(appliance.credentials, path / "ward-notes")
    yield path
    shutil.rmtree(path)


def test_the_python_of_the_page_runs_from_top_to_bottom(folder: Path) -> None:
    (folder / "page.py").write_text("\n".join(blocks(PAGE, "python")))
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"patient":"Julia Nguyen"' in done.stdout
    assert "of the audit log" in done.stdout


@pytest.mark.parametrize("number", range(2))
def test_the_commands_of_the_page_run_as_they_stand(folder: Path, number: int) -> None:
    commands = blocks(PAGE, "bash")
    assert len(commands) == 2
    done = typed(commands[number], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "accepted" in done.stdout
    assert "completed" in done.stdout


def documented() -> dict[str, str]:
    rows = re.findall(
        r"^\| ([A-Z_]+) \| ([A-Z_]+) \| (?:self|later|new id|no) \|", (ROOT / PAGE).read_text(), re.M
    )
    assert len(rows) == len(dict(rows)), "a code is in the table twice"
    return dict(rows)


def raised() -> dict[str, set[str]]:
    """Codes on the roads to a client, each with the statuses that stand beside it."""
    found: dict[str, set[str]] = {}
    for road in ROADS:
        place, _, function = road.partition("::")
        path = ROOT / place
        for file in [path] if path.is_file() else sorted(path.glob("*.py")):
            tree = ast.parse(file.read_text())
            constants = {
                target.id: node.value.value
                for node in tree.body
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
                for target in node.targets
                if isinstance(target, ast.Name) and isinstance(node.value.value, str)
            }
            within: list[ast.AST] = [
                n for n in ast.walk(tree) if function and getattr(n, "name", "") == function
            ] or [tree]
            for call in (node for part in within for node in ast.walk(part) if isinstance(node, ast.Call)):
                if ast.unparse(call.func) in RAISING:
                    for code in codes_of(call, constants):
                        found.setdefault(code, set()).update(statuses_of(call))
    return found


def codes_of(call: ast.Call, constants: dict[str, str]) -> set[str]:
    codes: set[str] = set()
    words = [*call.args, *(keyword.value for keyword in call.keywords)]
    for node in (node for word in words for node in ast.walk(word)):
        suffix = ast.unparse(node).strip("f'").rpartition("}")[2] if isinstance(node, ast.JoinedStr) else ""
        if re.fullmatch(r"_[A-Z]+", suffix):  # f"{what}_REVOKED"
            codes |= {f"{what}{suffix}" for what in ("KEY", "CERTIFICATE")}
        elif isinstance(node, ast.Constant | ast.Name):
            text = node.value if isinstance(node, ast.Constant) else constants.get(node.id)
            if isinstance(text, str) and re.fullmatch(r"[A-Z]{2,}(_[A-Z]+)*", text):
                codes.add(text)
    return codes


def statuses_of(call: ast.Call) -> set[str]:
    """The literal status of a CloisterError; of the others nothing is said here."""
    said = re.findall(r"StatusCode\.([A-Z_]+)", ast.unparse(call))
    if ast.unparse(call.func) != "CloisterError":
        return set()
    return set(said) or (set() if len(call.args) > 2 else {"INVALID_ARGUMENT"})


def test_the_table_has_every_code_that_a_client_can_be_told_and_no_other() -> None:
    codes = raised()
    assert sorted(NOT_TOLD.keys() - codes.keys()) == [], "no longer in the code"
    assert sorted(codes.keys() - NOT_TOLD.keys() - documented().keys()) == [], "missing in the table"
    assert sorted(documented().keys() - codes.keys()) == [], "in the table, not in the code"


def test_the_table_gives_each_code_the_status_that_the_code_gives_it() -> None:
    table = documented()
    wrong = {c: (table[c], said) for c, said in raised().items() if c in table and said and said != {table[c]}}
    assert wrong == {}
