"""Rounds of reading, writing, hashing and importing, in turn, so that a busy machine slows all of them alike."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

from bundles.benchmark import ceilings
from bundles.benchmark.model import write_model
from bundles.builder import Release, Signing, build, sign
from bundles.format.errors import BundleError
from bundles.trust import roots
from bundles.trust.signers import new_signer

MIN_SIZE = 32 * 1024 * 1024
_SPARE = 256 * 1024 * 1024
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        medium: a folder on the disk that bundles come from.
        store: a folder on the disk of the model store.
        size: bytes of the model.
        rounds: how often.
    """

    medium: Path
    store: Path
    size: int
    rounds: int


@dataclass(frozen=True)
class Round:
    """One round; rates in bytes per second.

    Attributes:
        cached: share of the bundle that was in memory although it was to be read from its disk.
        read: reading the bundle alone.
        write: writing as many bytes, durably.
        hashing: SHA-256 on one thread.
        hashing_all: SHA-256 on all processors at once, together.
        imported: payload over the whole import, from opening the bundle to the commit.
        streamed: payload over the part of it that reads, hashes and writes.
        rss_peak: most bytes of memory that the importing process had.
    """

    cached: float
    read: float
    write: float
    hashing: float
    hashing_all: float
    imported: float
    streamed: float
    rss_peak: int


@dataclass(frozen=True)
class Outcome:
    """All rounds.

    Attributes:
        bundle_bytes: of the bundle's file.
        cores: processors.
        rounds: each.
    """

    bundle_bytes: int
    cores: int
    rounds: tuple[Round, ...]

    def middle(self, name: str) -> float:
        """The median of one attribute of the rounds."""
        return float(median(getattr(round_, name) for round_ in self.rounds))

    @property
    def ceiling(self) -> float:
        """The median over the rounds of the least that disks and processor could do; each byte is hashed twice."""
        return float(median(map(self._ceiling, self.rounds)))

    def share(self, name: str = "imported") -> float:
        """Of its own round's ceiling, what an import reaches, 1 for all of it; the median, for machines drift."""
        return float(median(getattr(found, name) / self._ceiling(found) for found in self.rounds))

    def _ceiling(self, found: Round) -> float:
        return min(found.read, found.write, found.hashing_all / 2)

    def as_dict(self) -> dict[str, object]:
        """For programs."""
        medians = {name: self.middle(name) for name in Round.__dataclass_fields__}
        return {
            "bundle_bytes": self.bundle_bytes,
            "cores": self.cores,
            "medians": medians,
            "ceiling": self.ceiling,
            "share_of_ceiling": self.share(),
            "streamed_share_of_ceiling": self.share("streamed"),
            "rounds": [asdict(round_) for round_ in self.rounds],
        }


def measure(options: Options, say: Say) -> Outcome:
    """Build a bundle, then import it into a fresh store in every round; all of it is removed afterwards.

    Args:
        options: what is measured.
        say: is told what is done now.

    Raises:
        BundleError: STORE_SPACE; the import is refused.
        OSError: a disk.
    """
    _check_space(options)
    with _folder(options.medium) as medium, _folder(options.store) as store:
        say(f"building a bundle of {options.size >> 20} MiB in {options.medium}")
        root, bundle = _make_bundle(medium, options.size)
        size = bundle.stat().st_size
        rounds = []
        for number in range(1, options.rounds + 1):
            say(f"round {number} of {options.rounds}")
            rounds.append(_round(bundle, size, root, store))
        return Outcome(size, ceilings.cores(), tuple(rounds))


def _round(bundle: Path, size: int, root: bytes, store: Path) -> Round:
    read, write = ceilings.read_rate(bundle), ceilings.write_rate(store, size)
    hashing, hashing_all = ceilings.hash_rate(1), ceilings.hash_rate(ceilings.cores())
    cached = ceilings.drop_cache(bundle)
    told = _import(bundle, root, store)
    seconds, until = float(told["seconds"]), told["until"]
    return Round(
        cached,
        read,
        write,
        hashing,
        hashing_all,
        told["bytes"] / seconds,
        told["bytes"] / (until["content"] - until["streaming"]),
        told["rss_peak"],
    )


def _import(bundle: Path, root: bytes, store: Path) -> dict[str, Any]:
    """One import, in a process of its own and into a home of its own."""
    with _folder(store) as home:
        (home / "trust").mkdir(mode=0o700)
        (home / "trust" / "1.root.json").write_bytes(root)
        done = subprocess.run(
            [sys.executable, "-P", "-m", "bundles.benchmark", str(home), str(bundle)],
            stdout=subprocess.PIPE,
            check=True,
        )
    told: dict[str, Any] = json.loads(done.stdout)
    if told["state"] != "committed":
        raise BundleError(told["reason"], told["message"])
    return told


def _make_bundle(folder: Path, size: int) -> tuple[bytes, Path]:
    """The trust root and a signed bundle."""
    keys = {role: new_signer("ed25519") for role in ("root", "release")} | {
        "publisher": new_signer("ecdsa-sha2-nistp384")
    }
    expires = datetime.now(UTC) + timedelta(days=1)
    made = roots.make(1, expires, {role: [signer.key] for role, signer in keys.items()}, {})
    root = roots.parse(roots.sign_root(made, [keys["root"]]))
    bundle = folder / "benchmark.bundle"
    write_model(folder / "model", size)
    build(Release(name="benchmark", version="1", sequence=1), folder / "model", bundle)
    shutil.rmtree(folder / "model")
    sign(bundle, Signing(root, (keys["release"],), keys["publisher"]))
    return root.raw, bundle


def _check_space(options: Options) -> None:
    """Both folders may be on one disk: of the model, the bundle and its signed copy two are there at once."""
    factor = 3 if _one_disk(options.medium, options.store) else 2
    needs = ((options.medium, factor * options.size), (options.store, options.size))
    for folder, needed in needs:
        free = shutil.disk_usage(folder).free
        if free < needed + _SPARE:
            raise BundleError(
                "STORE_SPACE",
                f"{folder} has {free} bytes free, {needed + _SPARE} are needed; give a smaller --size",
            )


def _one_disk(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev


@contextmanager
def _folder(parent: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix=".benchmark-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
