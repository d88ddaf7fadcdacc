"""The checks that are not tests: style, types, imports, protos, shell, C++, size, suppressions, keys, docs, clock.

python .ci/gates.py          runs all; exits 1 and shows what each failing one found
python .ci/gates.py NAME...  runs these
"""

import ast
import functools
import re
import subprocess
import sys
import time
import tokenize
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40
MAX_CPP_FUNCTION_LINES = 60
MAX_CLOCK_FLOOR_DAYS = 200

_BUILT_AT = re.compile(r'^BUILT_AT = parse_time\("(\S+)Z"\)', re.M)
_GENERATED = re.compile(r"(_pb2(_grpc)?\.pyi?|/migrations/versions/\w+\.py)$")
_IGNORE = re.compile(r"#\s*type:\s*ignore(?!\[[\w, -]+\]\s+#\s*\S)")
# A header and enough base64 behind it; the header alone may stand in a program.
_PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----(\s|\\n|[\"'b])*[A-Za-z0-9+/=]{40}")
_NODE_ID = re.compile(r"\b(tests/[\w/]+\.py)::(\w+)(\[)?")
_TESTS_HEADER = re.compile(r"\|\s*tests?\s*\|\s*$")
_TESTED = re.compile(r"\|[^|]*::test_\w+[^|]*\|\s*$|\|\s*the same\s*\|\s*$|^\|[-:|\s]+$")
_CPP_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_CPP_BLOCK = re.compile(
    r"^(?!namespace|struct|class|enum|union|extern|typedef|#)\S[^\n]*\{\n(.*?)^\}", re.S | re.M
)
_FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
_LINK = re.compile(r"\]\((?!\w+:)([^)#{}\s]+)[)#]")  # a brace is of a template
_NOT_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def tracked(root: Path, suffix: str = "") -> list[Path]:
    """The files that belong to the repository, or will with the next commit."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True).stdout.decode().split("\0")
    paths = [root / name for name in names if name.endswith(suffix) and name]
    return [path for path in paths if path.is_file()]


def too_large(path: Path) -> Iterator[str]:
    """Files and functions with more lines of code than one can keep in mind; docstrings and comments are free."""
    source = path.read_text()
    tree = ast.parse(source)
    lines = _code_lines(path) - _docstring_lines(tree)
    if len(lines) > MAX_FILE_LINES:
        yield f"{path}: {len(lines)} lines of code, at most {MAX_FILE_LINES}"
    for node in ast.walk(tree):
        if isinstance(node, _FUNCTIONS):
            inside = len([n for n in lines if node.lineno <= n <= (node.end_lineno or node.lineno)])
            if inside > MAX_FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {inside} lines of code, at most {MAX_FUNCTION_LINES}"


def _code_lines(path: Path) -> set[int]:
    lines: set[int] = set()
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in _NOT_CODE and token.type != tokenize.ENCODING:
                lines.update(range(token.start[0], token.end[0] + 1))
    return lines


def _docstring_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                lines.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def too_large_cpp(path: Path) -> Iterator[str]:
    """The same of C++, whose functions may be longer; and files that do not begin with what they are for.

    A function is a block that begins and ends at the margin, as the formatter has them.
    """
    source = path.read_text()
    if not re.match(r"(//|/\*) \S", source):
        yield f"{path}:1: begin with a comment that says the file's one reason to exist"
    code = _CPP_COMMENT.sub(lambda comment: "\n" * comment[0].count("\n"), source)
    if (count := _filled(code)) > MAX_FILE_LINES:
        yield f"{path}: {count} lines of code, at most {MAX_FILE_LINES}"
    for block in _CPP_BLOCK.finditer(code):
        if (count := _filled(block[0])) > MAX_CPP_FUNCTION_LINES:
            number = code.count("\n", 0, block.start()) + 1
            yield f"{path}:{number}: a function of {count} lines of code, at most {MAX_CPP_FUNCTION_LINES}"


def _filled(text: str) -> int:
    return sum(1 for line in text.splitlines() if line.strip())


def bare_ignores(path: Path) -> Iterator[str]:
    """Type errors silenced without naming the error and the reason."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if _IGNORE.search(line) and not line.lstrip().startswith(("#", "_IGNORE")):
            yield f"{path}:{number}: name the error and the reason: # type: ignore[code]  # why"


def private_keys(path: Path) -> Iterator[str]:
    """Private keys in PEM form."""
    if _PRIVATE_KEY.search(path.read_bytes()):
        yield f"{path}: holds a private key; remove it from the history, too"


def unresolved(page: Path, root: Path) -> Iterator[str]:
    """Tests that a page of documentation names and nobody would run, and files it links that are not there."""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        for file, function, parameters in _NODE_ID.findall(line):
            if function not in _test_functions(root / file):
                yield f"{page}:{number}: {file}::{function} is no test"
            elif parameters:
                yield f"{page}:{number}: {file}::{function}: name the test without parameters, which change"
        for link in _LINK.findall(line):
            if not (page.parent / link).exists():
                yield f"{page}:{number}: {link} is not there"


def unshown(page: Path) -> Iterator[str]:
    """Rows of a table with a column for tests, the last one, that name none."""
    tests = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if not line.startswith("|"):
            tests = False
        elif _TESTS_HEADER.search(line):
            tests = True
        elif tests and not _TESTED.search(line):
            yield f"{page}:{number}: names no test that shows it"


@functools.cache
def _test_functions(path: Path) -> set[str]:
    """The tests that pytest collects from a file; all are functions at its top."""
    if not path.name.startswith("test_") or not path.is_file():
        return set()
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, _FUNCTIONS)]
    return {node.name for node in functions if node.name.startswith("test_")}


def wrong_clock_floor(source: str, committed: datetime) -> Iterator[str]:
    """A clock floor of the distribution that lies after its last commit, or so long before that it says little.

    Args:
        source: of the module that states it, as `BUILT_AT`.
        committed: when the last commit was made.
    """
    found = _BUILT_AT.search(source)
    if found is None:
        yield "BUILT_AT is not stated as parse_time(...)"
        return
    age = committed - datetime.fromisoformat(found[1]).replace(tzinfo=UTC)
    if not timedelta(0) <= age <= timedelta(days=MAX_CLOCK_FLOOR_DAYS):
        yield f"BUILT_AT is {age.days} days before the last commit; make it 0 to {MAX_CLOCK_FLOOR_DAYS}"


def _clock_floor() -> list[str]:
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%cI"]
    committed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    policy = ROOT / "bundles" / "trust" / "policy.py"
    return [
        f"{policy}: {found}" for found in wrong_clock_floor(policy.read_text(), datetime.fromisoformat(committed))
    ]


def _documentation() -> list[str]:
    return [finding for page in tracked(ROOT, ".md") for finding in (*unresolved(page, ROOT), *unshown(page))]


def _house_rules() -> list[str]:
    found: list[str] = []
    for path in tracked(ROOT, ".py"):
        if not _GENERATED.search(str(path)):
            found += [*too_large(path), *bare_ignores(path)]
    return found


def _key_scan() -> list[str]:
    return [finding for path in tracked(ROOT) for finding in private_keys(path)]


def _tool(*argv: str) -> Callable[[], list[str]]:
    """A check by another program: nothing found when it exits 0."""

    def run() -> list[str]:
        done = subprocess.run(
            [str(BIN / argv[0]), *argv[1:]], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return [] if done.returncode == 0 else (done.stdout + done.stderr).strip().splitlines()

    return run


def _cpp() -> list[str]:
    paths = [path for ending in (".cpp", ".h") for path in tracked(ROOT, ending)]
    unformatted = [path for path in paths if _tool("clang-format", "--dry-run", "-Werror", str(path))()]
    found = [f"{path}: not formatted; .venv/bin/clang-format -i formats it" for path in unformatted]
    return [*found, *(finding for path in paths for finding in too_large_cpp(path))]


def _shell_scripts() -> list[str]:
    paths = [
        p for p in tracked(ROOT) if p.suffix == ".sh" or p.read_bytes()[:20].startswith(b"#!/usr/bin/env bash")
    ]
    return _tool("shellcheck", *map(str, paths))()


GATES: dict[str, Callable[[], list[str]]] = {
    "format": _tool("ruff", "format", "--no-cache", "--check", "."),
    "lint": _tool("ruff", "check", "--no-cache", "."),
    "types": _tool("mypy"),
    "imports": _tool("lint-imports", "--no-cache"),
    "protos": _tool("buf", "lint"),
    "stubs": _tool("python", ".ci/stubs.py", "--check"),
    "pins": _tool("python", ".ci/pins.py", "--check"),
    "shell": _shell_scripts,
    "c++": _cpp,
    "house": _house_rules,
    "keys": _key_scan,
    "docs": _documentation,
    "clock": _clock_floor,
}


def main(names: list[str]) -> int:
    """Run the gates named, or all; the exit status."""
    failed = []
    for name in names or GATES:
        began = time.monotonic()
        found = GATES[name]()
        print(f"{name:<8} {'FAIL' if found else 'ok':<5} {time.monotonic() - began:5.1f} s", flush=True)
        for finding in found:
            print(f"  {finding}")
        if found:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
