"""Generate the protobuf stubs of every folder, or check that the committed ones are what the protos say.

    python .ci/stubs.py          writes them
    python .ci/stubs.py --check  exits 1 and names each that differs

Protos lie under FOLDER/protos/cloister/NAME/v1/NAME.proto; their stubs become FOLDER.protos.NAME_pb2 and
FOLDER.protos.NAME_pb2_grpc, typed by mypy-protobuf. Imports are rewritten to the owning folder, so that no
top-level package "cloister" exists in Python.
"""

import filecmp
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("appliance", "engine", "bundles")
_FROM = re.compile(r"^from cloister\.(\w+)\.v1 import (\w+) as (\w+)$", re.M)


def generate(folder: str, out: Path) -> None:
    """Write the stubs of one folder's protos into `out`, flat.

    Raises:
        subprocess.CalledProcessError: protoc refused a proto.
    """
    protos = ROOT / folder / "protos"
    with tempfile.TemporaryDirectory() as raw:
        outputs = [
            f"--{plugin}={raw}" for plugin in ("python_out", "grpc_python_out", "mypy_out", "mypy_grpc_out")
        ]
        includes = [f"-I{ROOT / name / 'protos'}" for name in FOLDERS]
        plugin_path = Path(sys.executable).parent
        plugins = [f"--plugin=protoc-gen-{p}={plugin_path / f'protoc-gen-{p}'}" for p in ("mypy", "mypy_grpc")]
        names = sorted(str(p.relative_to(protos)) for p in protos.rglob("*.proto"))
        subprocess.run(
            [sys.executable, "-m", "grpc_tools.protoc", *includes, *plugins, *outputs, *names],
            check=True,
            cwd=protos,
        )
        for path in Path(raw).rglob("*.py*"):
            (out / path.name).write_text(_flatten(path.read_text()))
    (out / "__init__.py").write_text('"""Generated protobuf stubs; see .ci/stubs.py."""\n')


def _flatten(source: str) -> str:
    """Imports of sibling protos point to the folder that owns them."""
    source = _FROM.sub(lambda m: f"from {_owner(m[1])}.protos import {m[2]} as {m[3]}", source)
    if "import cloister" in source or "from cloister" in source:
        source = re.sub(
            r"^(from|import) cloister\.(\w+)\.v1",
            lambda m: f"{m[1]} {_owner(m[2])}.protos",
            source,
            flags=re.M,
        )
    return source


def _owner(name: str) -> str:
    """The folder whose protos include cloister.NAME.v1."""
    return next(f for f in FOLDERS if (ROOT / f / "protos" / "cloister" / name).is_dir())


def main() -> int:
    """Write or check; the exit status."""
    differing = []
    for folder in FOLDERS:
        target = ROOT / folder / "protos"
        with tempfile.TemporaryDirectory() as fresh:
            generate(folder, Path(fresh))
            for path in sorted(Path(fresh).iterdir()):
                committed = target / path.name
                if committed.exists() and filecmp.cmp(path, committed, shallow=False):
                    continue
                differing.append(str(committed.relative_to(ROOT)))
                if "--check" not in sys.argv:
                    shutil.copyfile(path, committed)
    for name in differing:
        print(f"{'differs' if '--check' in sys.argv else 'written'}: {name}")
    return int("--check" in sys.argv and bool(differing))


if __name__ == "__main__":
    raise SystemExit(main())
