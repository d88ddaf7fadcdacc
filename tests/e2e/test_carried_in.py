"""From a site's own keys to a revoked model, through every real process: volumes, approval, trust bundle."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.appliance import DEMO_MODEL, Appliance, cloister, eventually, initialise, serving

pytestmark = pytest.mark.timeout(600)  # a model is loaded, on a machine that may be busy
VERSION = "demo-notes-s@1.0.1"


@pytest.fixture
def site() -> Iterator[Appliance]:
    """An appliance with nothing in it, whose root names a custodian."""
    folder = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp"))
    try:
        keys, home = folder / "keys", folder / "home"
        cloister("trust", "init", "--out", str(keys), "--custodians", "1")
        initialise(home, keys)
        with serving(home) as process:
            yield Appliance(home, keys, folder / "credentials", folder / "m.bundle", process)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def volumes_of(site: Appliance) -> list[Path]:
    """A signed release of the demo model in volumes, each on a medium of its own."""
    keys = {role: str(site.keys / f"{role}.key") for role in ("release", "publisher")}
    cloister("bundle", "build", "--model", str(DEMO_MODEL), "--name", "demo-notes-s", "--version", "1.0.1",
             "--sequence", "1", "--chunk-size", "1MiB", "--volume-size", "2MiB", "--out", str(site.bundle),
             "--root", str(site.keys / "root.json"), "--release-key", keys["release"],
             "--publisher-key", keys["publisher"])  # fmt: skip
    media = []
    for volume in sorted(site.bundle.parent.glob("m.bundle.*")):
        medium = site.bundle.parent / f"medium{volume.suffix}"
        medium.mkdir()
        media.append(volume.rename(medium / volume.name))
    return media


def wanted(site: Appliance) -> tuple[str, int]:
    """The one import there is, and the volume it waits for; nothing while no importer answers."""
    try:
        (found,) = site.json("bundle", "imports")
    except AssertionError:  # its exit status
        return "", 0
    return found["progress"]["import_id"], found["progress"]["volume_wanted"]


def test_a_model_is_carried_in_by_volumes_approved_run_and_revoked(site: Appliance) -> None:
    first, *others = volumes_of(site)
    assert len(others) > 1
    waits = site.cloister("bundle", "import", str(first), expect=3)
    assert "error: VOLUME_WANTED" in waits.stderr
    (begun,) = site.json("bundle", "imports")
    os.kill(site.pid_of("importer"), signal.SIGKILL)
    first.rename(first.with_name("in the drawer"))
    eventually(lambda: wanted(site) == (begun["progress"]["import_id"], 2), "the import, which goes on by itself")
    named = [word for volume in reversed(others) for word in ("--volume", str(volume))]
    assert VERSION in site.cloister("bundle", "import", str(first), *named).stdout

    (version,) = site.json("bundle", "list")
    assert (version["state"], version["approvals_required"]) == ("committed", 1)
    load = "model", "load", VERSION, "--as", "notes"
    assert "error: NOT_APPROVED: 0 of 1" in site.cloister(*load, expect=3).stderr
    statement = site.bundle.with_name("statement")
    approve = "trust", "approve", version["model_digest"], "--out", str(statement), "--key"
    cloister(*approve, str(site.keys / "custodian.key"), "--appliance", "elsewhere")
    assert "error: " in site.cloister("model", "approve", str(statement), expect=3).stderr
    statement.unlink()
    cloister(*approve, str(site.keys / "custodian.key"), "--appliance", "test")
    assert "approved by 1 of 1" in site.cloister("model", "approve", str(statement)).stdout
    site.cloister(*load)

    trust = site.bundle.with_name("trust.bundle")
    cloister("trust", "revoke", "--root", str(site.keys / "root.json"), "--manifest", version["model_digest"],
             "--revocation-key", str(site.keys / "revocation.key"), "--out", str(trust))  # fmt: skip
    assert "trust bundle accepted" in site.cloister("bundle", "import", str(trust)).stdout
    assert f"{VERSION} is REVOKED: MANIFEST_REVOKED" in site.cloister("bundle", "list").stdout
    assert "error: MODEL_REVOKED" in site.cloister("model", "load", VERSION, "--as", "again", expect=3).stderr
    eventually(lambda: any(r["decision"] == "revoked" for r in site.records()), "the revocation on record")
    assert site.deployment()["state"] == "ready", "a revocation is no outage by itself"

    os.kill(site.pid_of("worker"), signal.SIGKILL)
    eventually(lambda: site.deployment()["reason"] == "MODEL_REVOKED", "the model is not started again")
    told = [(r["kind"], r["decision"]) for r in site.records() if r["kind"] in ("version.state", "trust.change")]
    assert told == [("version.state", "approved"), ("trust.change", "accepted"), ("version.state", "revoked")]
