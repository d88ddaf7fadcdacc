"""Homes to import into, what is in their stores, and media whose reads are counted."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

from bundles.content.files import ModelFiles
from bundles.content.inspector import Inspector, Verdict
from bundles.durable import DISK, Fs
from bundles.format.manifest import Kind
from bundles.format.source import Source, open_source
from bundles.importer import kept, steering
from bundles.importer.importing import import_bundle, take_up
from bundles.importer.steering import Steering
from bundles.importer.workplace import Allowed, Workplace
from bundles.pipeline import Progress
from tests.bundles.making import CHUNK, Trust, sha256

NOW = datetime.now(UTC)


class Unquestioning(Inspector):
    """The stand-in's verdict without another process, which would only slow what is tested here."""

    def inspect(self, files: ModelFiles, kind: Kind) -> Verdict:
        size = sum(size for path, size in files.sizes.items() if path.endswith(".safetensors"))
        chat = ("chat",) if "chat_template.jinja" in files.sizes else ()
        return Verdict("LlamaForCausalLM", 512, size, "float16", ("generate", *chat))


def make_home(home: Path, trust: Trust) -> Path:
    (home / "trust").mkdir(parents=True)
    (home / "trust" / "1.root.json").write_bytes(trust.root.raw)
    return home


def open_place(home: Path, fs: Fs = DISK, allowed: Allowed | None = None, interval: int = CHUNK) -> Workplace:
    """A workplace that records every chunk, at one moment."""
    place = Workplace.open(home, Unquestioning(), fs=fs, allowed=allowed or Allowed(), interval=interval)
    return replace(place, now=lambda: NOW)


def bring(
    place: Workplace, path: Path, told: list[Progress] | None = None, steering: Steering | None = None
) -> Progress:
    """Import."""
    report = (told if told is not None else []).append
    return import_bundle(place, secrets.token_hex(4), path, report, steering)


def go_on(place: Workplace, told: list[Progress] | None = None) -> list[Progress]:
    """Take up every import that a process left, as the next one does; how they end."""
    report = (told if told is not None else []).append
    return [take_up(place, left, report) for left in place.ledger.unfinished()]


def stored(place: Workplace) -> dict[str, bytes]:
    """The store's files by their names."""
    return {path.name: path.read_bytes() for path in place.store.root.glob("sha256/*/*")}


def damaged_names(place: Workplace) -> list[str]:
    """Files of committed versions that are absent or not what their name says."""
    held = stored(place)
    return [digest for digest in place.ledger.listed() if sha256(held.get(digest, b"")) != digest]


def snapshot(home: Path) -> dict[str, bytes]:
    """Every file of a home but store.db, which says when."""
    return {
        str(path.relative_to(home)): path.read_bytes()
        for path in sorted(home.rglob("*"))
        if path.is_file() and not path.name.startswith("store.db")
    }


def spoil(path: Path) -> None:
    """A bit flips."""
    raw = path.read_bytes()
    os.chmod(path, 0o600)
    path.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    os.chmod(path, 0o444)


class Media:
    """The sources that an import opened."""

    def __init__(self) -> None:
        self.sources: list[Source] = []

    @property
    def bytes_read(self) -> int:
        return sum(source.bytes_read for source in self.sources)


@contextmanager
def counted() -> Iterator[Media]:
    """Notes what imports read from the first volume or the whole bundle; later volumes are not counted."""
    media = Media()

    def opened(path: Path) -> Source:
        media.sources.append(open_source(path))
        return media.sources[-1]

    with mock.patch.object(steering, "open_source", opened), mock.patch.object(kept, "open_source", opened):
        yield media
