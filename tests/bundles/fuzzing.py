"""What is fuzzed: for each parser, documents it knows, how they are changed, and what must hold where it accepts.

Where a parser stands behind a signature, the changed document is signed again with the right key.
"""

import base64
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import safetensors as reference

from bundles.content import safetensors
from bundles.content.files import ModelFiles
from bundles.content.inspector import Inspector, Verdict
from bundles.format import manifest as manifests
from bundles.format import strict_json
from bundles.format.container import ContainerReader, encode_header
from bundles.format.manifest import Kind
from bundles.format.paths import check_path
from bundles.format.source import beside
from bundles.reader import BundleReader
from bundles.trust import dsse, publishers, revocation, roots
from bundles.trust.keys import canonical_json
from bundles.verify import verify
from tests.bundles.forging import Ceremony, Draft, encoded, envelope, oms_signature
from tests.bundles.hostile_certificates import Authority, Keyholder, Leaf
from tests.bundles.hostile_form import checked
from tests.bundles.making import Members, sha256
from tests.bundles.making import safetensors as weights
from tests.bundles.mutating import mutated, mutated_json, written

LIMIT = 1 << 20


@dataclass(frozen=True)
class Target:
    """A parser.

    Attributes:
        seeds: documents that it accepts.
        change: makes another document of one of them.
        parse: parses; raises AssertionError where it accepts what it must not.
        wrap: puts a document into another one, which is what `parse` takes.
    """

    seeds: Sequence[bytes]
    change: Callable[[Random, bytes], bytes]
    parse: Callable[[bytes], None]
    wrap: Callable[[bytes], bytes] = bytes


def targets(good: Draft) -> dict[str, Target]:
    """Every target, by name, around a bundle that is good."""
    pinned = roots.parse(good["trust/1.root.json"])
    return _formats(good, pinned) | _publishers(good, pinned)


def _publishers(good: Draft, pinned: roots.Root) -> dict[str, Target]:
    keys, authority, publisher = good.keys, Authority(), Keyholder.ecdsa()
    certified = roots.parse(
        keys.root_document(
            1, lambda s: s.update({"x-cloister": {"certificate_authorities": {"publisher": [authority.pem]}}})
        )
    )
    chain = [authority.issue(publisher, Leaf())]
    statement = encoded(good.statement())
    signed = oms_signature(statement, publisher, chain)
    return {
        "publisher's statement": Target(
            [statement],
            _document,
            lambda raw: _read_publisher(raw, pinned),
            lambda raw: encoded(oms_signature(raw, keys.publisher)),
        ),
        "publisher's signature": Target(
            [good["oms.sig"], encoded(signed)], mutated_text, lambda raw: _read_publisher(raw, certified)
        ),
        "publisher's certificate": Target(
            chain,
            mutated,
            lambda raw: _read_certificate(raw, certified, chain[0]),
            lambda der: encoded(oms_signature(statement, publisher, [der])),
        ),
    }


def _formats(good: Draft, pinned: roots.Root) -> dict[str, Target]:
    keys = good.keys
    crl = base64.b64encode(Authority().revocation_list(5)).decode()
    return {
        "container": Target([_archive(good.members[:6]), _archive([])], _container, _read_container),
        "bundle": Target([_archive(good.members)], _members, lambda raw: _verify(raw, pinned, good.payload)),
        "trust bundle": Target([_archive(_trust_bundle(good))], _members, _read_trust),
        "json": Target([good.payload, good["trust/1.root.json"], b'[1,{"a":"\\u00e9"},null]'], _text, _read_json),
        "manifest": Target([good.payload], _document, _read_manifest),
        "signed manifest": Target([good["manifest.dsse.json"]], mutated_text, _reads_envelope),
        "root": Target([good["trust/1.root.json"]], lambda r, raw: _root(r, raw, keys), _reads_root(pinned)),
        "revocations": Target(
            [keys.revocations(crls=[crl])],
            lambda r, raw: _enveloped(r, raw, [keys.revocation]),
            lambda raw: _read_revocations(raw, pinned),
        ),
        "safetensors": Target([_WEIGHTS, good.content("model.safetensors")], _tensors, _read_tensors),
        "path": Target([b"a/b.json", "caf\u00e9/\u65e5.txt".encode()], mutated, _read_path),
    }


_WEIGHTS = weights(
    {"b": ("F32", [1], [4, 8]), "a": ("U8", [2, 2], [0, 4]), "e": ("F16", [0], [8, 8])}, bytes(range(8))
)


def _text(random: Random, raw: bytes) -> bytes:
    return mutated(random, raw) if random.random() < 0.5 else _document(random, raw)


def _document(random: Random, raw: bytes) -> bytes:
    """Another JSON document; now and then one that is none."""
    text = written(random, mutated_json(random, json.loads(raw)))
    return mutated(random, text) if random.random() < 0.2 else text


def mutated_text(random: Random, raw: bytes) -> bytes:
    """Another document of one that may be none any more."""
    try:
        return _document(random, raw) if random.random() < 0.8 else mutated(random, raw)
    except (ValueError, RecursionError):
        return mutated(random, raw)


def _enveloped(random: Random, raw: bytes, signers: Sequence[Keyholder]) -> bytes:
    """Another payload, signed again."""
    value = json.loads(raw)
    payload = _document(random, base64.b64decode(value["payload"]))
    return encoded(envelope(payload, signers, value["payloadType"]))


def _root(random: Random, raw: bytes, keys: Ceremony) -> bytes:
    """The next version, changed, signed again where it can be."""
    signed = json.loads(raw)["signed"] | {"version": random.choice((1, 2, 2, 2, 3))}
    changed = mutated_json(random, signed)
    try:
        message = canonical_json(changed)
    except Exception:  # whatever has no canonical form is sent with a signature over nothing
        message = b""
    signatures = [{"keyid": keys.root.keyid, "sig": keys.root.sign(message).hex()}]
    return written(random, {"signatures": signatures, "signed": changed})


def _container(random: Random, raw: bytes) -> bytes:
    """Other bytes, their headers' checksums now and then made right."""
    changed = bytearray(mutated(random, raw))
    if random.random() < 0.7:
        for at in range(0, len(changed) - 511, 512):
            if changed[at + 257 : at + 262] == b"ustar":
                changed[at : at + 512] = checked(bytes(changed[at : at + 512]))
    return bytes(changed)


def _members(random: Random, raw: bytes) -> bytes:
    """Members changed, lost, repeated, exchanged and renamed, in a sound container."""
    members, _ = _unpack(raw)
    for _ in range(random.randint(1, 3)):
        at, other = random.randrange(len(members)), random.randrange(len(members))
        (name, content), kind = members[at], random.randrange(6)
        if kind == 0 and len(members) > 1:
            del members[at]
        elif kind == 1:
            members.insert(other, (name, content))
        elif kind == 2:
            members[at], members[other] = members[other], members[at]
        elif kind == 3:
            members[at] = (members[other][0], content)
        else:
            text = name.endswith((".json", ".sig"))
            members[at] = (name, mutated_text(random, content) if text else mutated(random, content))
    return _archive(members)


def _unpack(raw: bytes) -> tuple[Members, int]:
    found, at = [], 0
    while any(header := raw[at : at + 512]):
        size = int(header[124:135], 8)
        found.append((header[:100].rstrip(b"\0").decode(), raw[at + 512 : at + 512 + size]))
        at += 512 - (-size // 512) * 512
    return found, at


def _trust_bundle(good: Draft) -> Members:
    header = {"format": "cloister.bundle", "format_version": 1, "kind": "trust"}
    documents = [
        ("trust/1.root.json", good["trust/1.root.json"]),
        ("trust/2.root.json", good.keys.root_document(2)),
        ("trust/revocation.json", good.keys.revocations()),
    ]
    return [("header.json", encoded(header)), *documents, ("end.json", encoded({"kind": "trust", "documents": 3}))]


def _archive(members: Iterable[tuple[str, bytes]]) -> bytes:
    parts = [encode_header(name, len(raw)) + raw + bytes(-len(raw) % 512) for name, raw in members]
    return b"".join(parts) + bytes(1024)


def _read_container(raw: bytes) -> None:
    fd = os.memfd_create("fuzzed")
    os.write(fd, raw)
    found: Members = []
    with closing(ContainerReader(fd)) as reader:
        while (member := reader.next()) is not None:
            found.append((member.name, reader.read(LIMIT)))
        assert reader.bytes_read == len(raw)
    assert _archive(found) == raw, "an archive has one encoding"


class _Believing(Inspector):
    """Another process would only slow what is looked at here."""

    def inspect(self, files: ModelFiles, kind: Kind) -> Verdict:
        size = sum(size for path, size in files.sizes.items() if path.endswith(".safetensors"))
        chat = ("chat",) if "chat_template.jinja" in files.sizes else ()
        return Verdict("LlamaForCausalLM", 512, size, "float16", ("generate", *chat))


@contextmanager
def _written(raw: bytes) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as file:
        file.write(raw)
        file.flush()
        yield Path(file.name)


def _verify(raw: bytes, root: roots.Root, payload: bytes) -> None:
    with _written(raw) as path:
        found = verify(path, root, inspector=_Believing())
    assert found.model_digest == sha256(payload), "what nobody signed"


def _read_trust(raw: bytes) -> None:
    with _written(raw) as path, closing(BundleReader(beside(path))) as reader:
        assert reader.read_header() == "trust"
        head = reader.read_trust()
    members, _ = _unpack(raw)
    assert [*head.roots, *([head.revocation] if head.revocation is not None else [])] == [
        c for _, c in members[1:-1]
    ]


def _read_json(raw: bytes) -> None:
    value = strict_json.parse(raw, "it")
    assert value == json.loads(raw)
    assert json.loads(json.dumps(value, allow_nan=False)) == value


def _read_manifest(raw: bytes) -> None:
    manifest = manifests.parse(raw)
    assert manifests.parse(manifest.encode()) == manifest
    assert json.loads(manifest.encode()) == json.loads(raw), "no field is read otherwise than it is written"
    assert sum(file.size for file in manifest.files) == manifest.total_size
    for file in manifest.files:
        _check_path(file.path)


def _reads_envelope(raw: bytes) -> None:
    found = dsse.parse(raw, "it")
    assert dsse.parse(found.encode(), "it") == found
    assert json.loads(found.encode()) == {"signatures": []} | json.loads(raw) or any(
        "keyid" not in entry for entry in json.loads(raw)["signatures"]
    )


def _reads_root(pinned: roots.Root) -> Callable[[bytes], None]:
    def read(raw: bytes) -> None:
        root = roots.parse(raw)
        newest = roots.advance(pinned, [root])
        signed = json.loads(raw)["signed"]
        assert newest.version in (1, 2)
        assert root.version == signed["version"]
        assert set(root.keys) == set(signed["keys"])
        for role in root.roles.values():
            assert 1 <= role.threshold <= len(set(role.keyids)) or root.extension.authorities

    return read


def _read_revocations(raw: bytes, root: roots.Root) -> None:
    found = revocation.verify(raw, root)
    payload = json.loads(base64.b64decode(json.loads(raw)["payload"]))
    assert json.loads(found.document.encode()) == payload
    assert len(found.crls) == len(payload["crls"])


def _read_publisher(raw: bytes, root: roots.Root) -> None:
    found = publishers.verify_model(raw, root, datetime.now(UTC))
    payload = json.loads(raw)["dsseEnvelope"]["payload"]
    statement = json.loads(base64.urlsafe_b64decode(payload.translate(str.maketrans("+/", "-_"))))
    assert [(r.name, r.digest) for r in found.resources] == [
        (entry["name"], entry["digest"]) for entry in statement["predicate"]["resources"]
    ]
    assert found.keyids


def _read_certificate(raw: bytes, root: roots.Root, only: bytes) -> None:
    _read_publisher(raw, root)
    (entry,) = json.loads(raw)["verificationMaterial"]["x509CertificateChain"]["certificates"]
    assert base64.b64decode(entry["rawBytes"]) == only, "a certificate that nobody issued"


def _tensors(random: Random, raw: bytes) -> bytes:
    """Another header over the same data, with its length made right; or any bytes."""
    (length,) = struct.unpack("<Q", raw[:8])
    if random.random() < 0.2:
        return mutated(random, raw)
    header = _document(random, raw[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + raw[8 + length :]


def _read_tensors(raw: bytes) -> None:
    found = safetensors.read_tensors(lambda at, length: raw[at : at + length], len(raw), "it.safetensors")
    (length,) = struct.unpack("<Q", raw[:8])
    position = 0
    for tensor in found:
        assert (tensor.begin, position) == (position, tensor.begin)
        position = tensor.end
    assert position == len(raw) - 8 - length
    theirs: list[tuple[str, Any]] = reference.deserialize(raw)
    assert {name for name, _ in theirs} == {tensor.name for tensor in found}, "as its own library reads it"


def _read_path(raw: bytes) -> None:
    text = raw.decode(errors="surrogateescape")
    check_path(text)
    _check_path(text)


def _check_path(path: str) -> None:
    assert path.encode()
    assert not path.startswith("/")
    assert not set(path) & set("\\:\0")
    assert not {"", ".", ".."} & set(path.split("/"))
