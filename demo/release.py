"""The demo's release engineer, on a machine that is not the appliance: keys, bundles, signatures, a lost key."""

import shutil
from datetime import UTC, datetime, timedelta

from demo.scene import LARGE, SMALL, Demo

_MB = 1000 * 1000
VOLUME, CHUNK = 15 * _MB, "4MiB"


def make_keys(demo: Demo) -> None:
    """Three release keys of which two must sign, a publisher, two custodians, and the root of trust over them."""
    with demo.page.step("Make keys: two of three sign a release, one of two custodians approves"):
        demo.cloister("trust", "init", "--out", demo.path("keys"), "--release-keys", "3",
                      "--release-threshold", "2", "--custodians", "2", "--custodian-threshold", "1")  # fmt: skip


def release_small(demo: Demo) -> None:
    """The small model, built, signed by its publisher and two release keys, verified; and one that is too old."""
    with demo.page.step("Build a bundle; the publisher signs it, then two release keys"):
        _build(demo, SMALL, "small.bundle")
        _sign(demo, "small.bundle", "root.json", "release-1", "release-2")
    with demo.page.step("Verify it as anyone with the root of trust can, without an appliance"):
        bundle = demo.path("small.bundle")
        said = demo.cloister("bundle", "verify", bundle, "--root", demo.path("keys/root.json"))
        demo.page.good(said.splitlines()[0])


def release_expired(demo: Demo) -> None:
    """The same a year ago, good for thirty days."""
    issued = (datetime.now(UTC) - timedelta(days=365)).strftime("%Y-%m-%dT%H:%M:%SZ")
    _build(demo, SMALL, "expired.bundle", "--issued-at", issued, "--expires-days", "30")
    _sign(demo, "expired.bundle", "root.json", "release-1", "release-2")


def lose_a_key(demo: Demo) -> None:
    """A release key is taken out of the root; the new root goes into a trust bundle of a few kilobytes."""
    with demo.page.step("A release key is lost: take it out of the root, tell the appliance"):
        demo.cloister("trust", "rotate", "--root", demo.path("keys/root.json"), "--remove",
                      f"release={_lost_key(demo)[:16]}",
                      "--root-key", demo.path("keys/root.key"))  # fmt: skip
        demo.cloister("trust", "bundle", "--root", demo.path("keys/root.json"),
                      "--root", demo.path("keys/2.root.json"), "--out", demo.path("trust.bundle"))  # fmt: skip
        demo.page.block(demo.cloister("bundle", "import", demo.path("trust.bundle")))


def release_large(demo: Demo) -> None:
    """The large model, in two volumes on two media, signed by the keys that are left."""
    with demo.page.step("Build a bundle of the large model, split for two small media"):
        (demo.machine.folder / "medium-1").mkdir()
        _build(demo, LARGE, "medium-1/large.bundle", "--volume-size", str(VOLUME), "--chunk-size", CHUNK)
        first = "medium-1/large.bundle.001"
        _sign(demo, first, "2.root.json", "release-1", "release-3")
        medium = demo.machine.folder / "medium-2"
        medium.mkdir()
        shutil.move(demo.machine.folder / "medium-1" / "large.bundle.002", medium)
        demo.page.line("The second volume travels on a medium of its own.")


def _build(demo: Demo, model: str, bundle: str, *options: str) -> None:
    demo.cloister("bundle", "build", "--model", demo.model(model), "--name", model, "--version", "1.0.0",
                  "--sequence", "1", "--out", demo.path(bundle), *options)  # fmt: skip


def _sign(demo: Demo, bundle: str, root: str, first: str, second: str) -> None:
    trust = ("--root", demo.path(f"keys/{root}"))
    demo.cloister("bundle", "sign", demo.path(bundle), *trust, "--publisher-key", demo.path("keys/publisher.key"),
                  "--release-key", demo.path(f"keys/{first}.key"))  # fmt: skip
    release_key = ("--release-key", demo.path(f"keys/{second}.key"))
    demo.page.line(demo.cloister("bundle", "sign", demo.path(bundle), *trust, *release_key))


def _lost_key(demo: Demo) -> str:
    """Key id of the second release key."""
    roles = demo.facts("trust", "show", demo.path("keys/root.json"))["roles"]
    keyid: str = roles["release"]["keys"][1]["keyid"]
    return keyid
