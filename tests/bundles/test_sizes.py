"""Sizes at which a 32-bit number, signed or not, and ustar's size field overflow: every byte counts to the last.

    pytest tests/bundles/test_sizes.py -m slow        # in CLOISTER_LARGE, a folder with 20 GiB free; else /var/tmp

The content never repeats, so that nothing is shared: every chunk is read, hashed and written.
"""

import hashlib
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from bundles.format.chunks import CHUNK_SIZE
from bundles.format.container import encode_header
from bundles.importer.importing import import_bundle
from bundles.importer.workplace import Workplace
from bundles.pipeline import State
from tests.bundles.forging import Ceremony, Draft, Fields
from tests.bundles.making import INSPECTOR, safetensors
from tests.bundles.reading import Medium

SMALL = {"config.json": b'{"architectures": ["LlamaForCausalLM"]}', "tokenizer.json": b"{}"}
LARGE = "weights.safetensors"  # the last file, so that the last chunk of the bundle is its last


@pytest.fixture
def disk() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="cl-large-", dir=os.environ.get("CLOISTER_LARGE", "/var/tmp")))
    yield folder
    shutil.rmtree(folder)


def _chunks(size: int) -> Iterator[bytes]:
    """A safetensors file of so many bytes of data, in chunks; the same each time, and no block of it twice."""
    stream = Cipher(AES(bytes(16)), CTR(struct.pack(">QQ", size, 0))).encryptor()
    held = safetensors({"w": ("U8", [size], [0, size])}, b"")
    left, block = size, bytes(8 << 20)
    while left or held:
        while left and len(held) < CHUNK_SIZE:
            held += stream.update(block[:left])
            left -= min(left, len(block))
        yield held[:CHUNK_SIZE]
        held = held[CHUNK_SIZE:]


def _describe(size: int) -> Fields:
    """The large file as a manifest lists it."""
    whole, chunks, length = hashlib.sha256(), [], 0
    for chunk in _chunks(size):
        whole.update(chunk)
        chunks.append(hashlib.sha256(chunk).hexdigest())
        length += len(chunk)
    return {
        "path": LARGE,
        "size": length,
        "sha256": whole.hexdigest(),
        "media_type": "application/vnd.safetensors",
        "role": "weights",
        "chunks": chunks,
    }


def _write(path: Path, keys: Ceremony, root: bytes, size: int) -> Fields:
    """A bundle with a large file, streamed; the file as its manifest lists it."""
    entry = _describe(size)

    def enlarge(fields: Fields) -> None:
        fields["files"].append(entry)
        fields["total_size"] += entry["size"]
        fields["model"]["parameters"] = entry["size"]

    draft = Draft.made(keys, root, SMALL, 1, CHUNK_SIZE).described(enlarge)
    draft = draft.with_oms(draft.statement())
    total, chunks = draft.manifest["total_size"], len(draft.chunks) + len(entry["chunks"])
    with path.open("wb") as stream:

        def add(name: str, content: bytes) -> None:
            stream.write(encode_header(name, len(content)) + content + bytes(-len(content) % 512))

        for name, content in draft.with_hints(total, chunks).members[:-1]:
            add(name, content)
        for digest, chunk in zip(entry["chunks"], _chunks(size), strict=True):
            add(f"c/{digest}", chunk)
        add(*draft.with_hints(total, chunks).members[-1])
        stream.write(bytes(1024))
    return entry


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("gibibytes", [2, 4, 8])
def test_a_file_beyond_2_4_and_8_gib_is_imported_and_its_last_byte_counts(disk: Path, gibibytes: int) -> None:
    keys, size = Ceremony(), (gibibytes << 30) + 4096
    root = keys.root_document(1)
    (disk / "medium").mkdir()
    bundle = disk / "medium" / "large.bundle"
    entry = _write(bundle, keys, root, size)
    (disk / "home" / "trust").mkdir(parents=True)
    (disk / "home" / "trust" / "1.root.json").write_bytes(root)
    place = Workplace.open(disk / "home", INSPECTOR)
    # Behind the last chunk: padding, end.json with its header, the end marker.
    last = bundle.stat().st_size - 1024 - 1024 - (-entry["size"] % 512) - 1
    _flip(bundle, last)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
    before = _memory("VmRSS")
    refused = import_bundle(place, "flipped", bundle, lambda _: None)
    assert (refused.state, refused.reason) == (State.REJECTED, "CHUNK_DIGEST")
    assert place.ledger.versions() == ()
    _flip(bundle, last)
    assert _memory("VmHWM") - before < 256 << 20
    with Medium(bundle.parent) as medium:
        ended = import_bundle(place, "whole", bundle, lambda _: None)
    assert ended.state is State.COMMITTED, ended
    assert ended.bytes_done == entry["size"] + sum(map(len, SMALL.values()))
    assert medium.bytes_read < place.interval + 2 * CHUNK_SIZE, "what is recorded as verified is not read again"
    stored = place.store.path_of(entry["sha256"])
    assert stored.stat().st_size == entry["size"] > gibibytes << 30
    with stored.open("rb") as stream:
        assert hashlib.file_digest(stream, "sha256").hexdigest() == entry["sha256"]
    place.ledger.close()


def _memory(name: str) -> int:
    """Bytes of this process's memory, by their name in /proc."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte[0] ^ 1]))
