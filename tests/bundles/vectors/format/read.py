"""Reads and verifies a bundle after docs/bundle-format.md, with the standard library and `cryptography` alone.

A second reader of the format, for the test vectors: keys are Ed25519 and ECDSA P-384 without certificates, and
nothing is judged beyond signatures, digests, sizes, names and order. What is not as it must be is a ValueError.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

Members = Iterator[tuple[str, bytes]]


def _need(holds: object, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _header(name: str, size: int) -> bytes:
    """The one legal header of a member."""
    header = bytearray(512)
    header[: len(name)] = name.encode("ascii")
    for at, field in (
        (100, b"0000444\0"),
        (108, b"0000000\0"),
        (116, b"0000000\0"),
        (124, b"%011o\0" % size),
        (136, b"00000000000\0"),
        (148, b"        "),
        (156, b"0"),
        (257, b"ustar\x0000"),
        (329, b"0000000\0"),
        (337, b"0000000\0"),
    ):
        header[at : at + len(field)] = field
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _members(archive: bytes) -> Members:
    at = 0
    while any(header := archive[at : at + 512]):
        name, size = header[:100].rstrip(b"\0").decode("ascii"), int(header[124:135], 8)
        _need(header == _header(name, size), "a header that is not the legal one")
        content, padding = archive[at + 512 : at + 512 + size], -size % 512
        at += 512 + size + padding
        _need(len(content) == size and not any(archive[at - padding : at]), "a cut member, or hidden bytes")
        yield name, content
    _need(archive[at:] == bytes(1024), "no end marker, or bytes behind it")


def _object(raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _need(len(dict(pairs)) == len(pairs), "a key twice")
        return dict(pairs)

    value = json.loads(raw, object_pairs_hook=unique)
    _need(isinstance(value, dict), "no object")
    return dict(value)


def _canonical(value: Any) -> bytes:
    if isinstance(value, dict):
        return b"{" + b",".join(_canonical(k) + b":" + _canonical(value[k]) for k in sorted(value)) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(map(_canonical, value)) + b"]"
    if isinstance(value, str):
        return b'"' + value.replace("\\", "\\\\").replace('"', '\\"').encode() + b'"'
    return json.dumps(value).encode()


def _verifies(key: dict[str, Any], signature: bytes, message: bytes) -> bool:
    public = key["keyval"]["public"]
    try:
        if key["scheme"] == "ed25519":
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(signature, message)
        else:
            loaded = serialization.load_pem_public_key(public.encode())
            _need(isinstance(loaded, ec.EllipticCurvePublicKey), "no ECDSA key")
            loaded.verify(signature, message, ec.ECDSA(hashes.SHA384()))  # type: ignore[union-attr, call-arg, arg-type]  # as was asked the line before
    except InvalidSignature:
        return False
    return True


def _count(root: dict[str, Any], role: str, signatures: list[tuple[str, bytes]], message: bytes) -> bool:
    """Whether as many keys of a role signed as must; a signature without a key id may be anybody's."""
    members = {keyid: root["keys"][keyid] for keyid in root["roles"][role]["keyids"]}
    valid = {
        keyid
        for keyid, key in members.items()
        for named, signature in signatures
        if named in ("", keyid) and _verifies(key, signature, message)
    }
    return len(valid) >= int(root["roles"][role]["threshold"])


def _root(raw: bytes, signed_by: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a root document says, once it is signed by its own root keys, and by those of another root."""
    document = _object(raw)
    signed: dict[str, Any] = document["signed"]
    _need(all(keyid == _sha256(_canonical(key)) for keyid, key in signed["keys"].items()), "a key id that lies")
    signatures = [(entry["keyid"], bytes.fromhex(entry["sig"])) for entry in document["signatures"]]
    for root in (signed, signed_by or signed):
        _need(_count(root, "root", signatures, _canonical(signed)), "a root that its keys did not sign")
    return signed


def _payload(envelope: dict[str, Any], kind: str, root: dict[str, Any], role: str) -> bytes:
    payload = base64.b64decode(envelope["payload"], validate=True)
    _need(envelope["payloadType"] == kind, "another payload type")
    message = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
    signatures = [(s.get("keyid", ""), base64.b64decode(s["sig"], validate=True)) for s in envelope["signatures"]]
    _need(_count(root, role, signatures, message), f"too few signatures of the role {role}")
    return payload


def _check_publisher(raw: bytes, manifest: dict[str, Any], root: dict[str, Any]) -> None:
    _need(_sha256(raw) == manifest["oms_sha256"], "another publisher's signature than the manifest names")
    payload = _payload(_object(raw)["dsseEnvelope"], "application/vnd.in-toto+json", root, "publisher")
    resources = _object(payload)["predicate"]["resources"]
    signed = {resource["name"]: resource["digest"] for resource in resources}
    _need(signed == {file["path"]: file["sha256"] for file in manifest["files"]}, "other files than were signed")


def _hints(manifest: dict[str, Any], volume: int) -> dict[str, Any]:
    names = ("bundle_id", "kind", "name", "version", "total_size")
    counted = {"volume": volume, "volumes": max(1, len(manifest["volumes"]))}
    return {
        "format": "cloister.bundle",
        "format_version": 1,
        **{name: manifest[name] for name in names},
        **counted,
    }


def _take(members: Members, name: str) -> bytes:
    found, content = next(members, ("the end", b""))
    _need(found == name, f"{found} where {name} must be")
    return content


def read(volumes: list[bytes], pinned: bytes, base: dict[str, bytes] | None = None) -> dict[str, bytes]:
    """The files of a bundle, by path, once everything about them holds.

    Args:
        volumes: the volumes' contents, in order; one of a whole bundle.
        pinned: the root that is believed.
        base: chunks of the base, by digest, of a delta.
    """
    members = _members(volumes[0])
    header = _object(_take(members, "header.json"))
    root = _root(pinned)
    name, content = next(members)
    while name.startswith("trust/"):
        version = int(name.removeprefix("trust/").removesuffix(".root.json"))
        _need(version <= root["version"] + 1, "a root is missing")
        same = version == root["version"]
        _need(not same or _object(content)["signed"] == root, "another root of the same version")
        root = _root(content, root) if version > root["version"] else root
        name, content = next(members)
    _need(name == "manifest.dsse.json", "no manifest")
    kind = "application/vnd.cloister.bundle-manifest.v1+json"
    manifest = _object(_payload(_object(content), kind, root, "release"))
    _need(header == _hints(manifest, 1), "a header of another bundle")
    _check_publisher(_take(members, "oms.sig"), manifest, root)
    for document in manifest["attestations"] + manifest["licences"]:
        content = _take(members, document["member"])
        _need((_sha256(content), len(content)) == (document["sha256"], document["size"]), "another document")
    return _files(volumes, members, manifest, base or {})


def _files(
    volumes: list[bytes], members: Members, manifest: dict[str, Any], base: dict[str, bytes]
) -> dict[str, bytes]:
    carried = _chunks(volumes, members, manifest, base)
    files = {}
    for file in manifest["files"]:
        left, content = file["size"], b""
        for digest in file["chunks"]:
            chunk = base[digest] if manifest["base"] and digest in base else _next_chunk(carried, digest)
            _need(len(chunk) == min(left, manifest["chunk_size"]), "a chunk of another size")
            _need(_sha256(chunk) == digest, "another chunk")
            content, left = content + chunk, left - len(chunk)
        _need(left == 0 and _sha256(content) == file["sha256"], "another file")
        files[file["path"]] = content
    _need(next(carried, None) is None, "more chunks than files have")
    _need(sum(map(len, files.values())) == manifest["total_size"], "another size than stated")
    return files


def _next_chunk(carried: Members, digest: str) -> bytes:
    return _take(carried, f"c/{digest}")


def _chunks(volumes: list[bytes], members: Members, manifest: dict[str, Any], base: dict[str, bytes]) -> Members:
    """The chunks that are in the bundle, from one volume after the other."""
    absent = base if manifest["base"] else {}
    count = sum(digest not in absent for file in manifest["files"] for digest in file["chunks"])
    plan = [volume["chunks"] for volume in manifest["volumes"]] or [count]
    _need(len(plan) == len(volumes) and sum(plan) == count, "another number of volumes or chunks")
    for number, (chunks, archive) in enumerate(zip(plan, volumes, strict=True), start=1):
        if number > 1:
            members = _members(archive)
            _need(_object(_take(members, "header.json")) == _hints(manifest, number), "another volume")
        for _ in range(chunks):
            yield next(members)
        end = {"bundle_id": manifest["bundle_id"], "volume": number, "chunks": chunks}
        _need(_object(_take(members, "end.json")) == end, "an end of another bundle or volume")
        _need(next(members, None) is None, "a member after the last")
