"""Writes the test vectors of the format after docs/bundle-format.md, with the standard library and `cryptography`.

    python -m tests.bundles.vectors.format.make [FOLDER]

Nothing of `bundles` is used: this is a second writer of the format. Keys, times and ids are fixed and every
signature is deterministic, so the files are always the same. The keys are public and worth nothing.
"""

import base64
import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

HERE = Path(__file__).parent
CHUNK = 4096
ISSUED = "2026-01-31T12:00:00Z"
EXPIRES = "2099-01-01T00:00:00Z"
Members = list[tuple[str, bytes]]
Chunks = list[tuple[str, bytes]]


def sha256(content: bytes) -> str:
    """Hex."""
    return hashlib.sha256(content).hexdigest()


def _seed(name: str) -> bytes:
    return hashlib.sha256(f"cloister test vector: {name}".encode()).digest()


ROOT_KEY = Ed25519PrivateKey.from_private_bytes(_seed("root"))
NEW_ROOT_KEY = Ed25519PrivateKey.from_private_bytes(_seed("new root"))
RELEASE_KEYS = [Ed25519PrivateKey.from_private_bytes(_seed(f"release {n}")) for n in (1, 2)]
PUBLISHER_KEY = ec.derive_private_key(int.from_bytes(_seed("publisher")), ec.SECP384R1())


def _ed25519(key: Ed25519PrivateKey) -> dict[str, Any]:
    raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return {"keytype": "ed25519", "scheme": "ed25519", "keyval": {"public": raw.hex()}}


def _pem(key: ec.EllipticCurvePrivateKey) -> str:
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return key.public_key().public_bytes(*form).decode()


def _canonical(value: Any) -> bytes:
    """OLPC canonical JSON."""
    if isinstance(value, dict):
        return b"{" + b",".join(_canonical(k) + b":" + _canonical(value[k]) for k in sorted(value)) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(map(_canonical, value)) + b"]"
    if isinstance(value, str):
        return b'"' + value.replace("\\", "\\\\").replace('"', '\\"').encode() + b'"'
    return json.dumps(value).encode()


def _keyid(key: dict[str, Any]) -> str:
    return sha256(_canonical(key))


def _root(version: int, root_key: Ed25519PrivateKey, signed_by: list[Ed25519PrivateKey]) -> bytes:
    publisher = {"keytype": "ecdsa", "scheme": "ecdsa-sha2-nistp384", "keyval": {"public": _pem(PUBLISHER_KEY)}}
    roles = {
        "root": ([_ed25519(root_key)], 1),
        "release": ([_ed25519(key) for key in RELEASE_KEYS], 2),
        "publisher": ([publisher], 1),
    }
    signed = {
        "_type": "root",
        "spec_version": "1.0.34",
        "version": version,
        "expires": EXPIRES,
        "consistent_snapshot": True,
        "keys": {_keyid(key): key for keys, _ in roles.values() for key in keys},
        "roles": {
            name: {"keyids": [_keyid(key) for key in keys], "threshold": threshold}
            for name, (keys, threshold) in roles.items()
        },
    }
    message = _canonical(signed)
    signatures = [{"keyid": _keyid(_ed25519(key)), "sig": key.sign(message).hex()} for key in signed_by]
    return json.dumps({"signatures": signatures, "signed": signed}, indent=1).encode() + b"\n"


def _pae(payload_type: str, payload: bytes) -> bytes:
    return b"DSSEv1 %d %s %d %s" % (len(payload_type), payload_type.encode(), len(payload), payload)


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _envelope(payload: bytes) -> bytes:
    kind = "application/vnd.cloister.bundle-manifest.v1+json"
    message = _pae(kind, payload)
    signatures = [{"keyid": _keyid(_ed25519(key)), "sig": _b64(key.sign(message))} for key in RELEASE_KEYS]
    return json.dumps({"payload": _b64(payload), "payloadType": kind, "signatures": signatures}).encode()


def _oms(name: str, files: dict[str, bytes]) -> bytes:
    digests = {path: sha256(content) for path, content in sorted(files.items())}
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": sha256(b"".join(map(bytes.fromhex, digests.values())))}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [],
            },
            "resources": [{"name": n, "algorithm": "sha256", "digest": d} for n, d in digests.items()],
        },
    }
    payload, kind = json.dumps(statement).encode(), "application/vnd.in-toto+json"
    signature = PUBLISHER_KEY.sign(_pae(kind, payload), ec.ECDSA(hashes.SHA384(), deterministic_signing=True))
    bundle = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": sha256(_pem(PUBLISHER_KEY).encode())}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": _b64(payload),
            "payloadType": kind,
            "signatures": [{"sig": _b64(signature), "keyid": ""}],
        },
    }
    return json.dumps(bundle).encode()


def _model(changed: bool) -> dict[str, bytes]:
    """The files of the model, in order of their names; one chunk of the weights may be changed."""
    data = bytearray((i * 7) % 251 for i in range(2 * CHUNK))
    if changed:
        data[-1] ^= 1
    header = json.dumps(
        {"w": {"dtype": "F16", "shape": [len(data) // 2], "data_offsets": [0, len(data)]}}
    ).encode()
    return {
        "LICENSE": b"Do as you like.\n",
        "config.json": b'{"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-06}',
        "model.safetensors": struct.pack("<Q", len(header)) + header + bytes(data),
        "tokenizer.json": b'{"model": {"type": "BPE"}}',
    }


_KINDS = {
    "LICENSE": ("licence", "text/plain"),
    "config.json": ("config", "application/json"),
    "model.safetensors": ("weights", "application/vnd.safetensors"),
    "tokenizer.json": ("tokenizer", "application/json"),
}


def _cut(content: bytes) -> list[bytes]:
    return [content[at : at + CHUNK] for at in range(0, len(content), CHUNK)]


def _file(path: str, content: bytes) -> dict[str, Any]:
    role, media_type = _KINDS[path]
    chunks = [sha256(chunk) for chunk in _cut(content)]
    digest = sha256(content)
    return {
        "path": path,
        "size": len(content),
        "sha256": digest,
        "media_type": media_type,
        "role": role,
        "chunks": chunks,
    }


_CANARY = {
    "messages": [{"role": "user", "content": "1+1="}],
    "expected": "2",
    "match": "prefix",
    "max_tokens": 4,
}
# What is the same in all manifests here.
_COMMON = {
    "schema": "cloister.bundle/1",
    "product": "cloister",
    "kind": "model",
    "name": "vector",
    "issued_at": ISSUED,
    "not_before": ISSUED,
    "expires": None,
    "min_engine": "0.1",
    "supersedes": None,
    "base": None,
    "targets": [],
    "requires": [],
    "resources": {"gpu_memory": 0, "gpus": 0},
    "chunk_size": CHUNK,
    "volumes": [],
    "canary": [_CANARY],
    "canary_pass_percent": 100,
    "critical": [],
}


def _described(files: dict[str, bytes]) -> dict[str, Any]:
    """What engine-inspect finds of the model."""
    return {
        "architecture": "LlamaForCausalLM",
        "dtype": "float16",
        "quantisation": None,
        "max_context_tokens": 512,
        "parameters": len(files["model.safetensors"]),
        "capabilities": ["generate"],
        "tokenizer_sha256": sha256(files["tokenizer.json"]),
    }


def _document(member: str, content: bytes, **more: Any) -> dict[str, Any]:
    return {"member": member, "size": len(content), "sha256": sha256(content), **more}


def _manifest(sequence: int, files: dict[str, bytes], oms: bytes, documents: Members, **parts: Any) -> bytes:
    attested, licence = documents
    own = {
        "bundle_id": _seed(f"bundle {sequence} {sorted(parts)}").hex()[:32],
        "version": f"1.0.{sequence}",
        "sequence": sequence,
        "model": _described(files),
        "files": [_file(path, content) for path, content in files.items()],
        "total_size": sum(map(len, files.values())),
        "oms_sha256": sha256(oms),
        "attestations": [_document(*attested)],
        "licences": [_document(*licence, spdx="0BSD", accept=False)],
    }
    return json.dumps(_COMMON | own | parts, indent=1).encode()


def _header(manifest: bytes, volume: int) -> bytes:
    fields = json.loads(manifest)
    hints = {"format": "cloister.bundle", "format_version": 1, "volume": volume}
    hints |= {name: fields[name] for name in ("bundle_id", "kind", "name", "version", "total_size")}
    return json.dumps(hints | {"volumes": max(1, len(fields["volumes"]))}).encode()


def _volume(manifest: bytes, number: int, head: Members, chunks: Chunks) -> Members:
    """The members of one volume."""
    end = {"bundle_id": json.loads(manifest)["bundle_id"], "volume": number, "chunks": len(chunks)}
    return [
        ("header.json", _header(manifest, number)),
        *head,
        *((f"c/{digest}", content) for digest, content in chunks),
        ("end.json", json.dumps(end).encode()),
    ]


def _member(name: str, content: bytes) -> bytes:
    fields = [name.encode().ljust(100, b"\0"), b"0000444\0", b"0000000\0" * 2, b"%011o\0" % len(content)]
    fields += [
        b"0" * 11 + b"\0",
        b" " * 8,
        b"0",
        bytes(100),
        b"ustar\x0000",
        bytes(64),
        b"0000000\0" * 2,
        bytes(167),
    ]
    header = b"".join(fields)
    header = header[:148] + b"%06o\0 " % sum(header) + header[156:]
    return header + content + bytes(-len(content) % 512)


def _archive(members: Members) -> bytes:
    return b"".join(_member(*member) for member in members) + bytes(1024)


def _bundles() -> dict[str, bytes]:
    first, second = _model(changed=False), _model(changed=True)
    documents = [("attest/statement.json", b'{"note": "made by hand"}\n'), ("licence/LICENSE", first["LICENSE"])]
    root = [("trust/1.root.json", _root(1, ROOT_KEY, [ROOT_KEY]))]

    def head(manifest: bytes, oms: bytes) -> Members:
        return [*root, ("manifest.dsse.json", _envelope(manifest)), ("oms.sig", oms), *documents]

    def chunks(files: dict[str, bytes], absent: frozenset[str] = frozenset()) -> Chunks:
        named = [(sha256(chunk), chunk) for content in files.values() for chunk in _cut(content)]
        return [(digest, chunk) for digest, chunk in named if digest not in absent]

    oms, carried = _oms("vector", first), chunks(first)
    whole = _manifest(1, first, oms, documents)
    members = _volume(whole, 1, head(whole, oms), carried)
    found = {"whole.bundle": _archive(members)} | {f"folder/{name}": content for name, content in members}

    split = [{"index": 1, "chunks": 3}, {"index": 2, "chunks": len(carried) - 3}]
    volumes = _manifest(1, first, oms, documents, volumes=split)
    found["volumes.bundle.001"] = _archive(_volume(volumes, 1, head(volumes, oms), carried[:3]))
    found["volumes.bundle.002"] = _archive(_volume(volumes, 2, [], carried[3:]))

    oms = _oms("vector", second)
    delta = _manifest(2, second, oms, documents, base=sha256(whole), supersedes=sha256(whole))
    changed = chunks(second, frozenset(digest for digest, _ in carried))
    found["delta.bundle"] = _archive(_volume(delta, 1, head(delta, oms), changed))
    return found


def _trust_bundle() -> bytes:
    header = {"format": "cloister.bundle", "format_version": 1, "kind": "trust"}
    root = _root(2, NEW_ROOT_KEY, [ROOT_KEY, NEW_ROOT_KEY])
    members = [
        ("header.json", json.dumps(header).encode()),
        ("trust/2.root.json", root),
        ("end.json", json.dumps({"kind": "trust", "documents": 1}).encode()),
    ]
    return _archive(members)


def vectors() -> dict[str, bytes]:
    """Every file of the vectors, by its path."""
    return {"root.json": _root(1, ROOT_KEY, [ROOT_KEY]), "trust.bundle": _trust_bundle()} | _bundles()


def main() -> None:
    """Write them."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    for name, content in vectors().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
