"""Makes what the tests need: tiny model folders, keys with their root, bundles, and forged ones."""

import hashlib
import json
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from bundles.build import Release, Signing, build, sign
from bundles.content.inspector import Inspector
from bundles.format.container import ContainerReader, ContainerWriter, open_file
from bundles.format.manifest import PAYLOAD_TYPE
from bundles.trust import dsse, roots
from bundles.trust.roots import Root
from bundles.trust.signers import PrivateSigner, Signer, new_signer

CHUNK = 4096
# Stands in for engine-inspect, a process that this folder does not own.
INSPECTOR = Inspector(command=(sys.executable, "-I", "-S", str(Path(__file__).with_name("stand_in_inspector.py"))))
Members = list[tuple[str, bytes]]


@dataclass(frozen=True)
class Trust:
    """A root and its private keys."""

    root: Root
    root_key: PrivateSigner
    release_key: PrivateSigner
    publisher_key: PrivateSigner

    def signing(self) -> Signing:
        return Signing(self.root, (self.release_key,), self.publisher_key)


def make_trust() -> Trust:
    root, release = new_signer("ed25519"), new_signer("ed25519")
    publisher = new_signer("ecdsa-sha2-nistp384")
    return Trust(
        make_root(1, {"root": [root], "release": [release], "publisher": [publisher]}), root, release, publisher
    )


def make_root(
    version: int,
    roles: Mapping[str, Sequence[Signer]],
    thresholds: Mapping[str, int] | None = None,
    signed_by: Sequence[Signer] | None = None,
    days: int = 365,
) -> Root:
    members = {role: [signer.key for signer in held] for role, held in roles.items()}
    signed = roots.make(version, datetime.now(UTC) + timedelta(days=days), members, thresholds or {})
    return roots.parse(roots.sign_root(signed, signed_by or roles["root"]))


def safetensors(tensors: Mapping[str, tuple[str, list[int], list[int]]], data: bytes) -> bytes:
    """Of name -> (dtype, shape, offsets)."""
    header = {name: {"dtype": d, "shape": s, "data_offsets": o} for name, (d, s, o) in tensors.items()}
    return with_header(json.dumps(header).encode(), data)


def with_header(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def make_model(folder: Path, seed: int = 0) -> Path:
    """A folder of a few chunks; `seed` changes the weights."""
    folder.mkdir(parents=True)
    data = bytes((i * 7 + seed) % 251 for i in range(3 * CHUNK))
    weights = safetensors({"w": ("F16", [len(data) // 2], [0, len(data)])}, data)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-06}')
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "LICENSE").write_text("Do as you like.\n")
    (folder / "canaries.json").write_text(
        '{"note": 1.5, "decoding": {"max_tokens": 4},'
        ' "canaries": [{"messages": [{"role": "user", "content": "1+1="}], "expected": "2", "gap": 0.5}]}'
    )
    return folder


def make_release(sequence: int = 1, **changes: Any) -> Release:
    fields = {"name": "tiny", "version": f"1.0.{sequence}", "sequence": sequence, "chunk_size": CHUNK} | changes
    return Release(**fields)


def make_bundle(path: Path, trust: Trust, sequence: int = 1, **changes: Any) -> Path:
    """A signed bundle; a sequence has its own weights."""
    model = path.with_name(f"{path.name}.model")
    make_model(model, seed=sequence)
    build(make_release(sequence, **changes), model, path, inspector=INSPECTOR)
    sign(path, trust.signing())
    return path


def members_of(path: Path) -> Members:
    found = []
    with closing(ContainerReader(open_file(path))) as reader:
        while (member := reader.next()) is not None:
            found.append((member.name, reader.read(member.size)))
    return found


def write_members(path: Path, members: Members) -> None:
    with path.open("wb") as stream:
        writer = ContainerWriter(stream)
        for name, content in members:
            writer.add(name, content)
        writer.close()


def replace_member(path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    write_members(path, [(n, change(c) if n == name else c) for n, c in members_of(path)])


def forge_payload(path: Path, trust: Trust, change: Callable[[bytes], bytes]) -> None:
    """Change the manifest's bytes and sign them again with the real key: what a careless release would do."""

    def resign(raw: bytes) -> bytes:
        payload = change(dsse.parse(raw, "manifest").payload)
        return dsse.Envelope(payload, PAYLOAD_TYPE).signed_by(trust.release_key).encode()

    replace_member(path, "manifest.dsse.json", resign)


def forge_manifest(path: Path, trust: Trust, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest's fields and sign it again."""

    def edit(payload: bytes) -> bytes:
        fields = json.loads(payload)
        change(fields)
        return json.dumps(fields).encode()

    forge_payload(path, trust, edit)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
