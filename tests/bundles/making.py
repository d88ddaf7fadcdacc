"""Makes what the tests need: tiny model folders, keys with their root, bundles, and forged ones."""

import hashlib
import json
import shutil
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from bundles.builder import Release, Signing, build, sign
from bundles.content.inspector import Inspector
from bundles.format.container import ContainerReader, ContainerWriter, open_file
from bundles.format.manifest import PAYLOAD_TYPE, Manifest, parse
from bundles.format.members import encode_hints, end_document, header_hints
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


def make_bundle(
    path: Path,
    trust: Trust,
    sequence: int = 1,
    prepare: Callable[[Path], object] = lambda model: None,
    **changes: Any,
) -> Path:
    """A signed bundle; a sequence has its own weights, and `prepare` may change the folder of the model."""
    model = make_model(path.with_name(f"{path.name}.model"), seed=sequence)
    prepare(model)
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


def manifest_of(path: Path) -> Manifest:
    """Of a bundle or its first volume; not believed."""
    return parse(dsse.parse(dict(members_of(path))["manifest.dsse.json"], "manifest").payload)


def unpack(path: Path, folder: Path) -> Path:
    """A whole bundle as a folder."""
    for name, content in members_of(path):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def split(path: Path, trust: Trust, *counts: int) -> Path:
    """A whole bundle or delta as volumes with so many chunks each, the rest in the last; the first one."""
    left = sum(name.startswith("c/") for name, _ in members_of(path)) - sum(counts)
    listed = [{"index": index, "chunks": chunks} for index, chunks in enumerate((*counts, left), start=1)]
    whole = path.with_name(f"{path.name}.whole")
    shutil.copy(path, whole)
    forge_manifest(whole, trust, lambda fields: fields.update(volumes=listed))
    manifest, members = manifest_of(whole), members_of(whole)
    head = [member for member in members[1:-1] if not member[0].startswith("c/")]
    chunks = [member for member in members if member[0].startswith("c/")]
    for volume in manifest.volumes:
        carried, chunks = chunks[: volume.chunks], chunks[volume.chunks :]
        ends = (header_hints(manifest, volume.index), end_document(manifest, volume.chunks, volume.index))
        first, last = map(encode_hints, ends)
        inner = [*(head if volume.index == 1 else []), *carried]
        write_members(
            path.with_name(f"{path.name}.{volume.index:03}"), [("header.json", first), *inner, ("end.json", last)]
        )
    whole.unlink()
    return path.with_name(f"{path.name}.001")


def make_delta(path: Path, base: Path, trust: Trust) -> Path:
    """A whole bundle, in place, without the chunks that `base` has, a bundle as well."""
    older = dsse.parse(dict(members_of(base))["manifest.dsse.json"], "manifest").payload
    forge_manifest(path, trust, lambda fields: fields.update(base=sha256(older)))
    absent = {f"c/{digest}" for file in parse(older).files for digest in file.chunks}
    kept = [member for member in members_of(path)[:-1] if member[0] not in absent]
    carried = sum(name.startswith("c/") for name, _ in kept)
    end = encode_hints(end_document(manifest_of(path), carried))
    write_members(path, [*kept, ("end.json", end)])
    return path
