"""Write constraints.txt from what is installed here, or check that every requirement is pinned and installed so.

    python .ci/pins.py          writes the file; the CUDA libraries of a machine without a GPU are kept as they are
    python .ci/pins.py --check  exits 1 and names each package that is missing from it or differs

The pins hold for the public index and for a CPU-only wheel alike: local version tags (+cpu) are left out.
"""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "constraints.txt"
_HEADER = "# Every direct and transitive requirement of all extras, pinned. Made by: python .ci/pins.py\n"
BUILD_TOOLS = ("cmake>=3.21", "ninja>=1.11")
"""What scikit-build-core asks for where the system has none; always installed, so that builds are alike."""

_CUDA = re.compile(r"^(nvidia|cuda)-")


def wanted() -> dict[str, str]:
    """Name -> version of everything the extras need, as installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = [*project["build-system"]["requires"], *BUILD_TOOLS, *project["project"]["dependencies"]]
    lines += [line for extra in project["project"]["optional-dependencies"].values() for line in extra]
    queue, found = [Requirement(line) for line in lines], dict[str, str]()
    seen: set[tuple[str, frozenset[str]]] = set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        distribution = metadata.distribution(name)
        found[name] = distribution.version.partition("+")[0]
        queue += _needs(distribution, requirement.extras)
    return found


def _needs(distribution: metadata.Distribution, extras: set[str]) -> list[Requirement]:
    """What a distribution requires on this machine."""
    requirements = [Requirement(line) for line in distribution.requires or ()]
    environments = [{"extra": extra} for extra in ("", *extras)]
    return [r for r in requirements if r.marker is None or any(r.marker.evaluate(e) for e in environments)]


def pinned() -> dict[str, str]:
    """Name -> version as constraints.txt has it."""
    if not FILE.exists():
        return {}
    lines = (line.partition("#")[0].strip() for line in FILE.read_text().splitlines())
    return {name: version for name, _, version in (line.partition("==") for line in lines if line)}


def main() -> int:
    """Write or check; the exit status."""
    have, want = pinned(), wanted()
    if "--check" not in sys.argv:
        pins = {**{n: v for n, v in have.items() if _CUDA.match(n)}, **want}
        FILE.write_text(_HEADER + "".join(f"{name}=={pins[name]}\n" for name in sorted(pins)))
        return 0
    wrong = {name: version for name, version in want.items() if have.get(name) != version}
    for name, version in sorted(wrong.items()):
        print(f"{name}: installed {version}, pinned {have.get(name, 'not at all')}")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
