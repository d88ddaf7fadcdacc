"""Bundles as an attacker makes them: a good one taken apart, changed in one place, and signed again where he may.

Signatures, envelopes and members are written here by hand after docs/bundle-format.md, and not by the code that is
under attack: that code makes no such bundle.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, mldsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bundles.trust.keys import Key, canonical_json
from tests.bundles.making import CHUNK, Members, sha256

RELEASE_TYPE = "application/vnd.cloister.bundle-manifest.v1+json"
REVOCATION_TYPE = "application/vnd.cloister.revocation.v1+json"
STATEMENT_TYPE = "application/vnd.in-toto+json"
Fields = dict[str, Any]
Change = Callable[[Fields], object]
_HASHES: dict[int, hashes.HashAlgorithm] = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}


@dataclass(frozen=True)
class Keyholder:
    """Whoever holds a private key."""

    private: Any

    @classmethod
    def ed25519(cls) -> "Keyholder":
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def ecdsa(cls, curve: ec.EllipticCurve | None = None) -> "Keyholder":
        return cls(ec.generate_private_key(curve or ec.SECP384R1()))

    @property
    def listed(self) -> Fields:
        """As a trust root lists the key."""
        return dict(Key.of(self.private.public_key()).as_dict())

    @property
    def keyid(self) -> str:
        return sha256(canonical_json(self.listed))

    @property
    def pem(self) -> str:
        form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        return str(self.private.public_key().public_bytes(*form).decode())

    def sign(self, message: bytes) -> bytes:
        if isinstance(self.private, ec.EllipticCurvePrivateKey):
            return self.private.sign(message, ec.ECDSA(_HASHES[self.private.curve.key_size]))
        if isinstance(self.private, mldsa.MLDSA65PrivateKey):
            message = b"tuf\x01" + hashlib.sha512(message).digest()  # TAP 21
        return bytes(self.private.sign(message))


def pae(payload_type: str, payload: bytes) -> bytes:
    """What DSSE v1 signs."""
    return b"DSSEv1 %d %s %d %s" % (len(payload_type), payload_type.encode(), len(payload), payload)


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def encoded(value: object) -> bytes:
    return json.dumps(value).encode()


def time_text(days: float) -> str:
    """A time so many days from now, as signed documents write it."""
    return (datetime.now(UTC) + timedelta(days=days)).strftime("%Y-%m-%dT%H:%M:%SZ")


def envelope(payload: bytes, signers: Iterable[Keyholder], kind: str = RELEASE_TYPE) -> Fields:
    message = pae(kind, payload)
    signatures = [{"keyid": signer.keyid, "sig": b64(signer.sign(message))} for signer in signers]
    return {"payload": b64(payload), "payloadType": kind, "signatures": signatures}


@dataclass(frozen=True)
class Ceremony:
    """The keys behind a trust root: two of three release keys must sign."""

    root: Keyholder = field(default_factory=Keyholder.ed25519)
    release: tuple[Keyholder, ...] = field(default_factory=lambda: tuple(Keyholder.ed25519() for _ in range(3)))
    publisher: Keyholder = field(default_factory=Keyholder.ecdsa)
    revocation: Keyholder = field(default_factory=Keyholder.ed25519)
    stranger: Keyholder = field(default_factory=Keyholder.ed25519)

    @property
    def roles(self) -> Mapping[str, tuple[Sequence[Keyholder], int]]:
        """Holders and threshold of each role."""
        return {
            "root": ([self.root], 1),
            "release": (self.release, 2),
            "publisher": ([self.publisher], 1),
            "revocation": ([self.revocation], 1),
        }

    def root_document(
        self,
        version: int,
        change: Change = lambda _: None,
        signers: Iterable[Keyholder] | None = None,
        **roles: tuple[Sequence[Keyholder], int],
    ) -> bytes:
        """A root with these roles in the place of the usual ones, its signed part changed, and signed."""
        held = {**self.roles, **roles}
        signed: Fields = {
            "_type": "root",
            "spec_version": "1.0.34",
            "version": version,
            "expires": time_text(365),
            "consistent_snapshot": True,
            "keys": {holder.keyid: holder.listed for holders, _ in held.values() for holder in holders},
            "roles": {
                name: {"keyids": [holder.keyid for holder in holders], "threshold": threshold}
                for name, (holders, threshold) in held.items()
            },
        }
        change(signed)
        message = canonical_json(signed)
        signatures = [
            {"keyid": signer.keyid, "sig": signer.sign(message).hex()} for signer in signers or [self.root]
        ]
        return encoded({"signatures": signatures, "signed": signed})

    def revocations(self, **changes: object) -> bytes:
        """The revocation document of today, signed."""
        document = {
            "schema": "cloister.revocation/1",
            "sequence": 1,
            "issued_at": time_text(0),
            "expires": time_text(30),
            "keys": [],
            "manifests": [],
            "certificates": [],
            "crls": [],
            "minimum_sequences": {},
        }
        return encoded(envelope(encoded(document | changes), [self.revocation], REVOCATION_TYPE))


def oms_statement(files: Mapping[str, str]) -> Fields:
    """An OMS v1.0 statement over files: path to SHA-256."""
    listed = sorted(files.items())
    root_digest = sha256(b"".join(bytes.fromhex(digest) for _, digest in listed))
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "tiny", "digest": {"sha256": root_digest}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [],
            },
            "resources": [{"name": name, "algorithm": "sha256", "digest": digest} for name, digest in listed],
        },
    }


def oms_signature(statement: bytes, signer: Keyholder, chain: Sequence[bytes] = ()) -> Fields:
    """An OMS v1.0 signature document by a raw key, or by the key of a certificate chain (DER, leaf first)."""
    signed = envelope(statement, [signer], STATEMENT_TYPE)
    signed["signatures"][0]["keyid"] = ""
    material: Fields = {"publicKey": {"hint": sha256(signer.pem.encode())}}
    if chain:
        material = {"x509CertificateChain": {"certificates": [{"rawBytes": b64(der)} for der in chain]}}
    return {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": material | {"tlogEntries": []},
        "dsseEnvelope": signed,
    }


@dataclass(frozen=True)
class Draft:
    """A bundle in parts. Every method makes a new one; what is signed over a changed part is signed again.

    Attributes:
        keys: whose bundle it is.
        members: what is in it, in order.
        signers: release keys that sign the manifest.
    """

    keys: Ceremony
    members: tuple[tuple[str, bytes], ...]
    signers: tuple[Keyholder, ...]

    @classmethod
    def made(
        cls, keys: Ceremony, root: bytes, files: Mapping[str, bytes], sequence: int, chunk_size: int = CHUNK
    ) -> "Draft":
        """A good bundle of these files."""
        documents = {"attest/scan.json": b'{"found": []}', "licence/LICENSE": b"Do as you like.\n"}
        fields = _manifest(documents, files, sequence) | {"chunk_size": chunk_size}
        hints = {name: fields[name] for name in ("bundle_id", "kind", "name", "version")}
        header = {"format": "cloister.bundle", "format_version": 1, **hints, "volume": 1, "volumes": 1}
        members = (
            ("header.json", encoded(header)),
            ("trust/1.root.json", root),
            ("manifest.dsse.json", encoded(envelope(encoded(fields), ()))),
            ("oms.sig", b""),
            *documents.items(),
            ("end.json", encoded({"bundle_id": fields["bundle_id"], "volume": 1})),
        )
        return cls(keys, members, keys.release[:2]).holding(files)

    def __getitem__(self, name: str) -> bytes:
        return dict(self.members)[name]

    def where(self, name: str) -> int:
        return [found for found, _ in self.members].index(name)

    @property
    def manifest(self) -> Fields:
        return dict(json.loads(self.payload))

    @property
    def payload(self) -> bytes:
        return base64.b64decode(json.loads(self["manifest.dsse.json"])["payload"])

    @property
    def chunks(self) -> list[str]:
        """Names of the chunk members, in order."""
        return [name for name, _ in self.members if name.startswith("c/")]

    def statement(self) -> Fields:
        return oms_statement({file["path"]: file["sha256"] for file in self.manifest["files"]})

    def arranged(self, change: Callable[[Members], Iterable[tuple[str, bytes]]]) -> "Draft":
        """With other members; nothing is signed again."""
        return replace(self, members=tuple(change(list(self.members))))

    def put(self, name: str, content: bytes) -> "Draft":
        """With one member's content changed."""
        return self.arranged(lambda members: ((n, content if n == name else c) for n, c in members))

    def insert(self, after: str, name: str, content: bytes) -> "Draft":
        at = self.where(after) + 1
        return self.arranged(lambda members: [*members[:at], (name, content), *members[at:]])

    def without(self, name: str) -> "Draft":
        return self.arranged(lambda members: (entry for entry in members if entry[0] != name))

    def with_root(self, *roots: bytes) -> "Draft":
        """With more trust roots, each named by the version it states."""
        draft = self
        for raw in roots:
            version = json.loads(raw)["signed"]["version"]
            last = [name for name, _ in draft.members if name == "header.json" or name.endswith(".root.json")][-1]
            draft = draft.insert(last, f"trust/{version}.root.json", raw)
        return draft

    def with_revocations(self, raw: bytes) -> "Draft":
        before = self.members[self.where("manifest.dsse.json") - 1][0]
        return self.insert(before, "trust/revocation.json", raw)

    def enveloped(self, change: Change) -> "Draft":
        """With the manifest's envelope changed and nothing signed again."""
        value = json.loads(self["manifest.dsse.json"])
        change(value)
        return self.put("manifest.dsse.json", encoded(value))

    def stated(self, payload: bytes, signers: Iterable[Keyholder] | None = None) -> "Draft":
        """With other manifest bytes, signed by the release keys."""
        signed = envelope(payload, self.signers if signers is None else signers)
        return self.put("manifest.dsse.json", encoded(signed))

    def signed_by(self, *signers: Keyholder) -> "Draft":
        """With the manifest signed by these, now and in every later change."""
        return replace(self, signers=signers).stated(self.payload)

    def described(self, change: Change) -> "Draft":
        """With other manifest fields, signed."""
        fields = self.manifest
        change(fields)
        return self.stated(encoded(fields))

    def with_oms(self, statement: Fields, signer: Keyholder | None = None, chain: Sequence[bytes] = ()) -> "Draft":
        """With a publisher's statement, which the manifest names."""
        return self.published(encoded(oms_signature(encoded(statement), signer or self.keys.publisher, chain)))

    def published(self, raw: bytes) -> "Draft":
        """With these bytes as the publisher's signature, which the manifest names."""
        held = "oms.sig" in dict(self.members)
        placed = self.put("oms.sig", raw) if held else self.insert("manifest.dsse.json", "oms.sig", raw)
        return placed.described(lambda manifest: manifest.update(oms_sha256=sha256(raw)))

    def holding(self, files: Mapping[str, bytes | None]) -> "Draft":
        """With files added, replaced or (None) removed, all over: chunks, manifest, both signatures."""
        kept = {entry["path"]: entry for entry in self.manifest["files"] if entry["path"] not in files}
        contents = {path: content for path, content in files.items() if content is not None}
        size = self.manifest["chunk_size"]
        entries = kept | {path: _entry(path, content, size) for path, content in contents.items()}
        chunks = dict(self.members) | {
            f"c/{sha256(piece)}": piece for content in contents.values() for piece in _pieces(content, size)
        }
        listed = [entries[path] for path in sorted(entries)]
        carried = [f"c/{digest}" for entry in listed for digest in entry["chunks"]]
        head = [entry for entry in self.members[:-1] if not entry[0].startswith("c/")]
        total = sum(entry["size"] for entry in listed)
        members = (*head, *((name, chunks[name]) for name in carried), self.members[-1])
        draft = replace(self, members=members).with_hints(total, len(carried))
        draft = draft.described(lambda manifest: manifest.update(files=listed, total_size=total))
        return draft.with_oms(draft.statement())

    def split(self) -> tuple["Draft", "Draft"]:
        """In two volumes."""
        chunks = self.chunks
        half = len(chunks) // 2
        plan = [{"index": 1, "chunks": half}, {"index": 2, "chunks": len(chunks) - half}]
        whole = self.described(lambda manifest: manifest.update(volumes=plan))
        header, end = json.loads(self["header.json"]) | {"volumes": 2}, json.loads(self["end.json"])

        def volume(number: int, members: Iterable[tuple[str, bytes]]) -> "Draft":
            first = ("header.json", encoded(header | {"volume": number}))
            last = ("end.json", encoded(end | {"volume": number, "chunks": plan[number - 1]["chunks"]}))
            return replace(whole, members=(first, *members, last))

        at = whole.where(chunks[half])
        return volume(1, whole.members[1:at]), volume(2, whole.members[at:-1])

    def with_hints(self, total_size: int, chunks: int) -> "Draft":
        """With other numbers in its first and last member."""
        first, last = json.loads(self["header.json"]), json.loads(self["end.json"])
        draft = self.put("header.json", encoded(first | {"total_size": total_size}))
        return draft.put("end.json", encoded(last | {"chunks": chunks}))

    def content(self, path: str) -> bytes:
        """A file, whole."""
        (entry,) = (entry for entry in self.manifest["files"] if entry["path"] == path)
        held = dict(self.members)
        return b"".join(held[f"c/{digest}"] for digest in entry["chunks"])


def _manifest(documents: Mapping[str, bytes], files: Mapping[str, bytes], sequence: int) -> Fields:
    """All fields but those that `holding` fills in."""
    listed = {name: {"member": name, "size": len(raw), "sha256": sha256(raw)} for name, raw in documents.items()}
    return {
        "schema": "cloister.bundle/1",
        "product": "cloister",
        "bundle_id": f"{sequence:032x}",
        "kind": "model",
        "name": "tiny",
        "version": f"1.0.{sequence}",
        "sequence": sequence,
        "issued_at": time_text(0),
        "not_before": time_text(0),
        "expires": time_text(300),
        "min_engine": "0.1.0",
        "supersedes": None,
        "base": None,
        "targets": [],
        "requires": [],
        "model": {
            "architecture": "LlamaForCausalLM",
            "dtype": "float16",
            "quantisation": None,
            "max_context_tokens": 512,
            "parameters": sum(len(raw) for path, raw in files.items() if path.endswith(".safetensors")),
            "capabilities": ["generate", "chat"] if "chat_template.jinja" in files else ["generate"],
            "tokenizer_sha256": sha256(files["tokenizer.json"]),
        },
        "resources": {"gpu_memory": 0, "gpus": 0},
        "files": [],
        "total_size": 0,
        "volumes": [],
        "oms_sha256": None,
        "attestations": [listed["attest/scan.json"]],
        "licences": [{**listed["licence/LICENSE"], "spdx": "Apache-2.0", "accept": False}],
        "canary": [],
        "canary_pass_percent": 100,
        "critical": [],
    }


def _pieces(content: bytes, size: int) -> list[bytes]:
    return [content[at : at + size] for at in range(0, len(content), size)]


def _entry(path: str, content: bytes, chunk_size: int) -> Fields:
    """A file as a manifest lists it, with the role and type that its name has (docs/bundle-format.md)."""
    from bundles.format.manifest import media_type_of, role_of

    return {
        "path": path,
        "size": len(content),
        "sha256": sha256(content),
        "media_type": media_type_of(path),
        "role": role_of(path),
        "chunks": [sha256(piece) for piece in _pieces(content, chunk_size)],
    }


def flipped(raw: bytes, at: int) -> bytes:
    """One bit of one byte changed."""
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
