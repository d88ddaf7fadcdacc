"""One release in every form: the same bytes each time, in volumes, as a folder, as a delta, as an adapter."""

import errno
import os
import resource
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bundles.builder import Output, Signing, build, sign, written
from bundles.format.chunks import BUFFER_SIZE
from bundles.format.errors import BundleError
from bundles.format.manifest import Manifest, Requirement
from bundles.format.members import MAX_REVOCATION
from bundles.pipeline import Progress
from bundles.trust import dsse
from bundles.trust.signers import PrivateSigner, new_signer
from bundles.verify import inspect, verify
from tests.bundles.making import CHUNK, INSPECTOR, Trust, make_model, make_release, members_of, safetensors
from tests.bundles.trusting import RELEASE_KEY, REVOCATION_KEY, revocations, root_of

ISSUED = datetime(2026, 11, 20, tzinfo=UTC)
VOLUMES = Output(volume_size=56 * 1024, signature_room=16 * 1024)
FOLDER = Output(directory=True)


def _model(folder: Path, shards: int = 4) -> Path:
    """A sharded model of many chunks, no two of them alike."""
    make_model(folder)
    (folder / "model.safetensors").unlink()
    for i in range(shards):
        data = bytes((j * 31 + j // 251 + i) % 251 for j in range(3 * CHUNK))
        tensors = {f"w{i}": ("U8", [len(data)], [0, len(data)])}
        (folder / f"model-{i + 1:05}-of-{shards:05}.safetensors").write_bytes(safetensors(tensors, data))
    return folder


def _build(model: Path, out: Path, output: Output | None = None, sequence: int = 1, **changes: object) -> Manifest:
    release = make_release(sequence, **{"issued_at": ISSUED, **changes})
    return build(release, model, out, output=output, inspector=INSPECTOR)


def _bytes_of(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {file.relative_to(path.parent).as_posix(): file.read_bytes() for file in files}


@pytest.mark.parametrize("output", [None, VOLUMES, FOLDER], ids=["file", "volumes", "folder"])
def test_the_same_input_gives_the_same_bytes(tmp_path: Path, output: Output | None) -> None:
    made = []
    for name in ("one", "two"):
        model = _model(tmp_path / name / "m")
        (tmp_path / name / "out").mkdir()
        manifest = _build(model, tmp_path / name / "out" / "b", output)
        made.append(_bytes_of(tmp_path / name / "out"))
        assert manifest.bundle_id != "0" * 32
    assert made[0] == made[1]
    assert made[0]


def test_what_differs_has_another_id(tmp_path: Path) -> None:
    model = _model(tmp_path / "m")
    ids = [
        _build(model, tmp_path / "b", output, issued_at=at).bundle_id
        for output, at in ((None, ISSUED), (VOLUMES, ISSUED), (None, datetime(2026, 11, 19, tzinfo=UTC)))
    ]
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    ids.append(_build(model, tmp_path / "b").bundle_id)
    assert len(set(ids)) == len(ids)


def test_volumes_have_room_for_signatures_and_signing_rewrites_only_the_first(
    tmp_path: Path, trust: Trust
) -> None:
    assert VOLUMES.volume_size is not None
    manifest = _build(_model(tmp_path / "m"), tmp_path / "b", VOLUMES)
    paths = written(tmp_path / "b", manifest)
    assert len(paths) == len(manifest.volumes) > 2
    assert [path.name for path in paths] == [f"b.{i:03}" for i in range(1, len(paths) + 1)]
    assert not (tmp_path / "b").exists()
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in paths}
    sign(paths[0], trust.signing())
    assert {path for path in paths if (path.stat().st_ino, path.read_bytes()) != before[path]} == {paths[0]}
    assert all(path.stat().st_size <= VOLUMES.volume_size for path in paths)
    assert verify(paths[0], trust.root, inspector=INSPECTOR).manifest.bundle_id == manifest.bundle_id


def _largest_revocation() -> bytes:
    """A signed revocation document of as many bytes as one may have."""
    envelope = dsse.parse(revocations().raw, "it")
    missing = MAX_REVOCATION - len(envelope.encode())
    longer = replace(
        envelope, payload=envelope.payload.ljust(len(envelope.payload) + missing // 4 * 3), signatures=()
    )
    raw = longer.signed_by(REVOCATION_KEY).encode()
    assert MAX_REVOCATION - 16 < len(raw) <= MAX_REVOCATION
    return raw


def _signing_with(revocation: bytes) -> Signing:
    publisher = new_signer("ecdsa-sha2-nistp256")
    return Signing(root_of({"publisher": [publisher.key]}), (RELEASE_KEY,), publisher, revocation=revocation)


def test_the_largest_revocation_document_fits_the_first_volume(tmp_path: Path) -> None:
    model, output = _model(tmp_path / "m"), Output(volume_size=6 * 2**20)
    data = b"".join(i.to_bytes(4, "little") for i in range(2**19))
    (model / "more.safetensors").write_bytes(safetensors({"w": ("U8", [len(data)], [0, len(data)])}, data))
    manifest = _build(model, tmp_path / "b", output)
    assert len(manifest.volumes) == 2
    first, _ = written(tmp_path / "b", manifest)
    signing = _signing_with(_largest_revocation())
    sign(first, signing)
    sign(first, replace(signing, publisher_key=None))
    assert output.volume_size is not None
    assert MAX_REVOCATION < first.stat().st_size <= output.volume_size
    assert verify(first, signing.root, inspector=INSPECTOR).revocations is not None


def test_signing_never_makes_a_volume_larger_than_it_was_built_to_be(tmp_path: Path) -> None:
    first, *_ = written(tmp_path / "b", _build(_model(tmp_path / "m"), tmp_path / "b", VOLUMES))
    before = _bytes_of(first)
    with pytest.raises(BundleError, match="RELEASE_INVALID: signed so, the first volume would have"):
        sign(first, _signing_with(_largest_revocation()))
    assert _bytes_of(first) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("shares", [True, False])
def test_chunks_that_are_not_at_the_beginning_of_a_block_may_be_shared_by_the_signed_file(
    tmp_path: Path, trust: Trust, monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    """Whole blocks at whole blocks, as FICLONERANGE wants them; of a disk that cannot, all is copied."""
    path, real = tmp_path / "b", os.copy_file_range
    _build(_model(tmp_path / "m"), path)
    asked: list[tuple[int, int]] = []

    def share(source: int, to: int, count: int, at: int, begin: int) -> int:
        asked.append((at, begin))
        if not shares:
            raise OSError(errno.EXDEV, "not here")
        return real(source, to, min(count, 8192), at, begin)

    monkeypatch.setattr(os, "copy_file_range", share)
    for signing in (trust.signing(), replace(trust.signing(), publisher_key=None)):
        before = members_of(path)
        sign(path, signing)
        after = members_of(path)
        assert [member for member in after if member[0].startswith("c/")] == [
            member for member in before if member[0].startswith("c/")
        ]
    assert all(at % 4096 == begin % 4096 == 0 for at, begin in asked)
    assert len(asked) > 2 if shares else len(asked) == 2
    assert verify(path, trust.root, inspector=INSPECTOR).signers


def test_a_volume_too_small_for_a_chunk_or_the_head_is_bad_usage(tmp_path: Path) -> None:
    model = _model(tmp_path / "m")
    for output in (Output(volume_size=4096, signature_room=0), Output(volume_size=64 * 1024)):
        with pytest.raises(BundleError, match="RELEASE_INVALID"):
            _build(model, tmp_path / "b", output)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_folder_holds_each_chunk_once_and_is_never_replaced(tmp_path: Path, trust: Trust) -> None:
    model = _model(tmp_path / "m")
    (model / "a.txt").write_text("same")
    (model / "b.txt").write_text("same")
    out = tmp_path / "b"
    manifest = _build(model, out, FOLDER)
    chunks = {digest for file in manifest.files for digest in file.chunks}
    assert {path.name for path in (out / "c").iterdir()} == chunks
    sign(out, trust.signing())
    assert verify(out, trust.root, inspector=INSPECTOR).manifest.reference == "tiny@1.0.1"
    before = _bytes_of(out)
    with pytest.raises(BundleError, match="OUTPUT_EXISTS"):
        _build(model, out, FOLDER)
    assert _bytes_of(out) == before
    with pytest.raises(BundleError, match="RELEASE_INVALID"):
        _build(model, tmp_path / "c", Output(directory=True, volume_size=1 << 20))


def test_a_delta_holds_only_what_its_base_has_not(tmp_path: Path, trust: Trust) -> None:
    model = _model(tmp_path / "m")
    base, delta = tmp_path / "base", tmp_path / "delta"
    whole = _build(model, base)
    with pytest.raises(BundleError, match="RELEASE_INVALID"):
        _build(model, delta, Output(base=base), sequence=2)  # not signed: signing would change its digest
    sign(base, trust.signing())
    shard = model / "model-00002-of-00004.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    manifest = _build(model, delta, Output(base=base), sequence=2)
    assert manifest.base == inspect(base).model_digest
    (new,) = {c for f in manifest.files for c in f.chunks} - {c for f in whole.files for c in f.chunks}
    assert [name for name, _ in members_of(delta) if name.startswith("c/")] == [f"c/{new}"]
    with pytest.raises(BundleError, match="BASE_ABSENT"):
        sign(delta, trust.signing())
    sign(delta, trust.signing(), bases=[base])
    assert verify(delta, trust.root, inspector=INSPECTOR, bases=[base]).manifest.base == manifest.base
    with pytest.raises(BundleError, match="RELEASE_INVALID"):
        _build(model, delta, Output(base=base), sequence=2, chunk_size=2 * CHUNK)


def test_a_delta_in_volumes_counts_only_what_it_carries(tmp_path: Path, trust: Trust) -> None:
    model = _model(tmp_path / "m")
    base = tmp_path / "base"
    _build(model, base)
    sign(base, trust.signing())
    for i, shard in enumerate(sorted(model.glob("*.safetensors"))[:3]):
        raw = bytearray(shard.read_bytes())
        for at in range(4096, len(raw), 2048):
            raw[at] = (raw[at] + i + 1) % 251
        shard.write_bytes(raw)
    output = Output(volume_size=VOLUMES.volume_size, base=base, signature_room=VOLUMES.signature_room)
    manifest = _build(model, tmp_path / "d", output, sequence=2)
    assert len(manifest.volumes) > 1
    assert sum(volume.chunks for volume in manifest.volumes) < manifest.chunk_count
    first = written(tmp_path / "d", manifest)[0]
    sign(first, trust.signing(), bases=[base])
    verify(first, trust.root, inspector=INSPECTOR, bases=[base])


def test_an_adapter_states_what_it_needs(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8}')
    tensors = {"a": ("F32", [1], [0, 4])}
    (folder / "adapter_model.safetensors").write_bytes(safetensors(tensors, bytes(4)))
    (folder / "LICENSE").write_text("Do as you like.\n")
    needs = (Requirement(name="tiny", model_digest=None),)
    manifest = _build(folder, tmp_path / "b", kind="adapter", requires=needs)
    assert (manifest.kind, manifest.requires, manifest.model.architecture) == ("adapter", needs, "LoRA")
    for wrong in ({"kind": "adapter"}, {"kind": "model", "requires": needs}, {"kind": "draft"}):
        with pytest.raises(BundleError, match="RELEASE_INVALID"):
            _build(folder, tmp_path / "c", **wrong)
    draft = _build(make_model(tmp_path / "m"), tmp_path / "d", kind="draft", requires=needs)
    assert (draft.kind, draft.model.architecture) == ("draft", "LlamaForCausalLM")


def test_what_a_release_demands_and_its_canaries_rate_are_in_the_manifest(tmp_path: Path) -> None:
    model = _model(tmp_path / "m")
    (model / "canaries.json").write_text(
        '{"pass_percent": 90, "canaries": [{"messages": [{"role": "user", "content": "?"}], "expected": "{}",'
        ' "match": "json_fields"}]}'
    )
    manifest = _build(model, tmp_path / "b", gpu_memory=80 * 2**30, gpus=2, accept_licence=True)
    assert (manifest.resources.gpu_memory, manifest.resources.gpus) == (80 * 2**30, 2)
    assert (manifest.canary_pass_percent, manifest.canary[0].match) == (90, "json_fields")
    assert all(licence.accept for licence in manifest.licences)
    for wrong in ('{"canaries": [], "pass_percent": 101}', '{"canaries": [], "pass_percent": true}'):
        (model / "canaries.json").write_text(wrong)
        with pytest.raises(BundleError, match="MANIFEST_SCHEMA"):
            _build(model, tmp_path / "c")


@pytest.mark.parametrize("output", [None, VOLUMES, FOLDER], ids=["file", "volumes", "folder"])
def test_a_folder_that_changes_while_it_is_built_leaves_nothing(tmp_path: Path, output: Output | None) -> None:
    model = _model(tmp_path / "m")
    last = sorted(model.glob("*.safetensors"))[-1]

    def change(progress: Progress) -> None:
        if progress.bytes_done > progress.bytes_total * 0.6 and not progress.file.startswith(last.name):
            raw = last.read_bytes()
            last.unlink()
            last.write_bytes(raw)  # the same bytes, and yet another file

    with pytest.raises(BundleError, match="SOURCE_CHANGED"):
        build(make_release(), model, tmp_path / "b", output=output, inspector=INSPECTOR, report=change)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_building_holds_no_descriptor_for_each_file_and_little_memory(tmp_path: Path) -> None:
    model = _model(tmp_path / "m")
    for i in range(300):
        (model / f"{i}.txt").write_text(str(i))
    big = 16 * BUFFER_SIZE
    with (model / "model-00005-of-00005.safetensors").open("wb") as stream:
        stream.write(safetensors({"w5": ("U8", [big], [0, big])}, b""))
        stream.truncate(stream.tell() + big)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 24, hard))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        manifest = _build(model, tmp_path / "b", chunk_size=64 * 2**20)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert manifest.total_size > big
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < big // 1024 // 2  # KiB


class _Watching(PrivateSigner):
    """Counts what it signs."""

    def __init__(self, signer: PrivateSigner) -> None:
        super().__init__(signer.private)
        self.signed = 0

    def sign(self, message: bytes) -> bytes:
        self.signed += 1
        return super().sign(message)


def test_no_key_signs_before_every_chunk_of_every_volume_is_verified(tmp_path: Path, trust: Trust) -> None:
    manifest = _build(_model(tmp_path / "m"), tmp_path / "b", VOLUMES)
    first, *_, last = written(tmp_path / "b", manifest)
    raw = bytearray(last.read_bytes())
    raw[len(raw) // 2] ^= 1
    last.write_bytes(raw)
    before = first.read_bytes()
    release, publisher = _Watching(trust.release_key), _Watching(trust.publisher_key)
    with pytest.raises(BundleError, match=r"CHUNK_DIGEST|CONTAINER_"):
        sign(first, Signing(trust.root, (release,), publisher))
    last.unlink()
    with pytest.raises(BundleError, match="VOLUME_MISSING"):
        sign(first, Signing(trust.root, (release,), publisher))
    assert (release.signed, publisher.signed) == (0, 0)
    assert first.read_bytes() == before


def test_signing_a_folder_again_after_it_was_cut_off_half_way_ends_whole(tmp_path: Path, trust: Trust) -> None:
    out, copy = tmp_path / "b", tmp_path / "c"
    _build(_model(tmp_path / "m"), out, FOLDER)
    shutil.copytree(out, copy)
    sign(out, trust.signing())
    shutil.copy(out / "oms.sig", copy / "oms.sig")  # of all that signing writes, the manifest comes last
    sign(copy, Signing(trust.root, (trust.release_key,)))
    assert (verify(copy, trust.root, inspector=INSPECTOR)).signers == (trust.release_key.key.keyid,)
