"""The gates of .ci/ catch what they are there for."""

import base64
import importlib.util
import os
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import allowed, folder_of, patterns_of

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gates = load("gates")


def written(folder: Path, text: str) -> Path:
    path = folder / "x.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("statements", "findings"), [(39, 0), (40, 1)])
def test_a_function_has_at_most_40_lines_of_code(tmp_path: Path, statements: int, findings: int) -> None:
    body = "\n    # free\n\n".join(["", *["    x = 1"] * statements])
    path = written(tmp_path, f'def f():\n    """Free,\n\n    too."""\n{body}')
    assert len(list(gates.too_large(path))) == findings


@pytest.mark.parametrize(("statements", "findings"), [(400, 0), (401, 1)])
def test_a_file_has_at_most_400_lines_of_code(tmp_path: Path, statements: int, findings: int) -> None:
    path = written(tmp_path, '"""Free."""\n\n' + "# free\nx = 1\n" * statements)
    assert len(list(gates.too_large(path))) == findings


@pytest.mark.parametrize(("statements", "findings"), [(58, 0), (59, 1)])
def test_a_function_of_cpp_has_at_most_60_lines_of_code(tmp_path: Path, statements: int, findings: int) -> None:
    body = "".join("  x = 1;  // a statement\n  /* free\n     too */\n\n" for _ in range(statements))
    path = written(tmp_path, f"// Sets x.\nnamespace a {{\nvoid f() {{\n{body}}}\nvoid g() {{ x = 2; }}\n}}\n")
    assert len(list(gates.too_large_cpp(path))) == findings


@pytest.mark.parametrize(("statements", "findings"), [(400, 0), (401, 1)])
def test_a_file_of_cpp_has_at_most_400_lines_of_code(tmp_path: Path, statements: int, findings: int) -> None:
    path = written(tmp_path, "// Many.\n" + "/* free */\nextern int x;\n" * statements)
    assert len(list(gates.too_large_cpp(path))) == findings


def test_a_file_of_cpp_says_first_what_it_is_for(tmp_path: Path) -> None:
    assert len(list(gates.too_large_cpp(written(tmp_path, "#pragma once\n// For what.\n")))) == 1


@pytest.mark.parametrize(
    ("comment", "findings"),
    [("", 1), ("[arg-type]", 1), ("[arg-type]  # the stub is wrong", 0)],
)
def test_a_silenced_type_error_names_itself_and_its_reason(tmp_path: Path, comment: str, findings: int) -> None:
    path = written(tmp_path, "f(1)  # type: " + f"ignore{comment}\n")
    assert len(list(gates.bare_ignores(path))) == findings


@pytest.mark.parametrize("kind", ["", "RSA ", "EC ", "OPENSSH ", "ENCRYPTED "])
def test_a_private_key_is_found_wherever_it_lies(tmp_path: Path, kind: str) -> None:
    body = base64.b64encode(os.urandom(96)).decode()
    path = written(tmp_path, f"key = '''-----BEGIN {kind}PRIVATE KEY-----\n{body}\n")
    assert len(list(gates.private_keys(path))) == 1


def test_a_program_may_speak_of_private_keys(tmp_path: Path) -> None:
    path = written(tmp_path, 'assert b"-----BEGIN PRIVATE KEY-----" in pem  # the header alone is no key\n')
    assert list(gates.private_keys(path)) == []


@pytest.mark.parametrize(
    ("words", "findings"),
    [
        ("`tests/test_x.py::test_a`", 0),
        ("`tests/test_x.py::test_b`", 0),
        ("`tests/test_x.py::test_b[1-c]`", 1),  # only collecting the tests would tell whether it is there
        ("`tests/test_x.py::TestC::test_d`", 1),
        ("`tests/test_x.py::test_gone`", 1),
        ("`tests/test_x.py::helper`", 1),
        ("`tests/test_y.py::test_a`", 1),
        ("[here](tests/test_x.py) [there](https://example.org/x)", 0),
        ("[nowhere](gone.md)", 1),
    ],
)
def test_a_test_or_a_file_that_documentation_names_must_be_there(
    tmp_path: Path, words: str, findings: int
) -> None:
    (tmp_path / "tests").mkdir()
    code = "def test_a(): ...\n@pytest.mark.parametrize('n', [1])\ndef test_b(n): ...\ndef helper(): ...\n"
    (tmp_path / "tests" / "test_x.py").write_text(code)
    (tmp_path / "page.md").write_text(words)
    assert len(list(gates.unresolved(tmp_path / "page.md", tmp_path))) == findings


@pytest.mark.parametrize(
    ("row", "findings"),
    [("| x | `tests/test_x.py::test_a` |", 0), ("| x | the same |", 0), ("| x | |", 1), ("| ::test_a | - |", 1)],
)
def test_a_table_of_tests_names_one_in_every_row(tmp_path: Path, row: str, findings: int) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"| what | test |\n|---|---|\n{row}\n\n| what | how |\n|---|---|\n| free | no test |\n")
    assert len(list(gates.unshown(page))) == findings


def test_no_private_key_is_in_the_repository() -> None:
    assert [found for path in gates.tracked(ROOT) for found in gates.private_keys(path)] == []


@pytest.mark.parametrize(
    ("stated", "findings"),
    [
        ('BUILT_AT = parse_time("2026-06-01T00:00:00Z")', 0),
        ('BUILT_AT = parse_time("2026-06-02T00:00:01Z")  # after the commit', 1),
        ('BUILT_AT = parse_time("2025-11-13T00:00:00Z")  # 201 days before', 1),
        ("BUILT_AT = somewhere()", 1),
    ],
)
def test_the_clock_floor_is_not_after_the_last_commit_and_not_long_before(stated: str, findings: int) -> None:
    committed = datetime(2026, 6, 2, tzinfo=UTC)
    assert len(list(gates.wrong_clock_floor(f"X = 1\n{stated}\n", committed))) == findings


def test_a_skip_is_allowed_by_its_node_id_or_the_beginning_of_it() -> None:
    patterns = patterns_of("# comment\ntests/gpu/  # no GPU in CI\n\ntests/x.py::test_y\n")
    assert patterns == ["tests/gpu/", "tests/x.py::test_y"]
    assert allowed("tests/gpu/test_a.py::test_b", patterns)
    assert not allowed("tests/engine/test_a.py::test_b", patterns)


def test_times_are_kept_by_folder() -> None:
    assert folder_of("tests/engine/deep/test_a.py::test_b[a/b]") == "tests/engine"
    assert folder_of("tests/test_house.py::test_x") == "tests"


@pytest.mark.parametrize("script", ["install.sh", ".ci/run"])
def test_shell_scripts_stop_at_the_first_error(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in path.read_text()


def test_install_without_a_flag_says_that_it_installs_nothing_and_changes_nothing() -> None:
    done = subprocess.run([ROOT / "install.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "not part of this version" in done.stderr


def test_install_names_the_remedy_when_there_is_no_python(tmp_path: Path) -> None:
    """A machine with bash and the core tools alone: a copy of the script runs with a PATH that lacks Python."""
    for name in ("install.sh", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "cat", "sha256sum", "cut", "rm"):
        (tools / tool).symlink_to(f"/usr/bin/{tool}")
    done = subprocess.run(
        ["/usr/bin/bash", tmp_path / "install.sh", "--demo"],
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "error: no Python 3.11 or newer found" in done.stderr
    assert "PYTHON=/path/to/python3" in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_install_removes_no_folder_that_it_did_not_make(tmp_path: Path, make: Callable[[Path], None]) -> None:
    for name in ("install.sh", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    mine = tmp_path / ".venv"
    make(mine)
    done = subprocess.run(["bash", tmp_path / "install.sh", "--demo"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{mine} is there and is no virtual environment" in done.stderr
    assert mine.exists()


def test_the_caches_of_every_tool_lie_in_the_checkout(tmp_path: Path) -> None:
    """What install.sh exports is what every tool it starts is told about its cache."""
    text = (ROOT / "install.sh").read_text()
    (tmp_path / "install.sh").write_text(text.replace('  "")\n', '  env) env ;;\n  "")\n', 1))
    done = subprocess.run(
        ["bash", tmp_path / "install.sh", "env"],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    exported = dict(line.split("=", 1) for line in done.stdout.splitlines())
    for name in ("XDG_CACHE_HOME", "BUF_CACHE_DIR", "HF_HOME", "TRITON_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        assert exported[name].startswith(f"{tmp_path}/.venv/cache")
