"""The format's documentation names every field and every refusal there is."""

import json
import re
from pathlib import Path

from bundles.format.errors import exit_status_of
from bundles.trust import dsse
from tests.bundles.making import (
    members_of,
)

_NOT_REFUSALS = {
    "LC_ALL",
    "VIRTUAL_ENV",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "NEWOBJ_EX",
    "STACK_GLOBAL",
}


def test_the_engine_version_is_the_distribution_s() -> None:
    import tomllib

    from bundles.trust.policy import ENGINE_VERSION

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["version"] == ENGINE_VERSION


def test_the_manifest_has_no_field_beyond_the_documented_ones(bundle: Path) -> None:
    payload = json.loads(dsse.parse(dict(members_of(bundle))["manifest.dsse.json"], "it").payload)
    documented = (Path(__file__).parents[2] / "docs" / "bundle-format.md").read_text()
    assert [name for name in payload if f"`{name}`" not in documented] == []


def test_the_refusals_in_the_code_are_those_in_the_documentation() -> None:
    root = Path(__file__).parents[2]
    sources = "\n".join(path.read_text() for path in (root / "bundles").rglob("*.py"))
    codes = set(re.findall(r'"([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+|BASE64)"', sources)) - _NOT_REFUSALS
    page = (root / "docs" / "bundle-format.md").read_text()
    assert sorted(code for code in codes if f"`{code}`" not in page) == []
    listed = set(re.findall("`([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)`", page.partition("## Refusals")[2]))
    assert sorted(listed - codes) == []


def test_the_documentation_has_the_exit_status_of_every_code() -> None:
    refusals = (Path(__file__).parents[2] / "docs" / "bundle-format.md").read_text().partition("## Refusals")[2]
    statuses = refusals.partition("The table is")[0]
    failed, _, slips = statuses.partition("nothing was judged:")[2].partition("with 2 where")
    for text, status in ((failed, 1), (slips, 2)):
        codes = re.findall("`([A-Z_]+)`", text)
        assert codes
        assert {exit_status_of(code) for code in codes} == {status}
    listed = set(re.findall("`([A-Z][A-Z0-9_]+)`", refusals))
    assert {c for c in listed if exit_status_of(c) != 3} == set(re.findall("`([A-Z_]+)`", statuses))
