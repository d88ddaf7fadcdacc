"""Refusals 29 to 72: what could be read twice, names that are no names, containers that lie, media that change."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from bundles.importer.workplace import Workplace
from bundles.pipeline import Progress, State
from bundles.store.files import Store
from bundles.trust.policy import Site
from tests.bundles.attacks import Attack, Refusal, Scene, full_chunk, header_at, manifest, payload, spliced
from tests.bundles.forging import Draft, Fields, encoded
from tests.bundles.making import Members, sha256
from tests.bundles.reading import Pulled

_EMPTY = sha256(b"")


def _raw_path(raw: bytes) -> Callable[[bytes], bytes]:
    """The first file's path as these bytes."""

    def change(document: bytes) -> bytes:
        fields = json.loads(document)
        fields["files"][0]["path"] = "\0"
        return encoded(fields).replace(b'"\\u0000"', b'"' + raw + b'"')

    return change


def _path(name: str) -> Callable[[Scene], Draft]:
    return manifest(lambda fields: fields["files"][0].update(path=name))


def _paths(*names: str) -> Callable[[Scene], Draft]:
    def change(fields: Fields) -> None:
        for entry, name in zip(fields["files"], names, strict=False):
            entry["path"] = name

    return manifest(change)


def _nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def _envelope_text(change: Callable[[str], str]) -> Callable[[Scene], Draft]:
    """With the base64 of the payload written otherwise."""
    return lambda scene: scene.good.enveloped(lambda value: value.update(payload=change(value["payload"])))


def _unused_bits(text: str) -> str:
    """Other bits where base64 has none to spare: decoders of the lenient kind see the same bytes."""
    body, padding = text.rstrip("="), text[len(text.rstrip("=")) :]
    if not padding:
        return text[:-4] + text[-4:] + "===="
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return body[:-1] + alphabet[alphabet.index(body[-1]) ^ 1] + padding


JSON = (
    Refusal(
        29,
        "a key twice",
        "JSON_DUPLICATE_KEY",
        payload(lambda raw: raw.replace(b"{", b'{"sequence": 7,', 1)),
    ),
    Refusal(30, "NaN", "JSON_CONSTANT", manifest(lambda m: m.update(total_size=float("nan")))),
    Refusal(30, "Infinity", "JSON_CONSTANT", manifest(lambda m: m.update(total_size=float("inf")))),
    Refusal(30, "a fraction", "JSON_FLOAT", manifest(lambda m: m.update(total_size=1.5))),
    Refusal(31, "an integer above 2^53", "JSON_INTEGER", manifest(lambda m: m.update(total_size=2**53 + 1))),
    Refusal(31, "an integer of 5000 digits", "JSON_INTEGER", manifest(lambda m: m.update(total_size=10**4299))),
    Refusal(32, "nested too deep", "JSON_DEPTH", payload(lambda _: _nested(33))),
    Refusal(32, "nested without end", "JSON_DEPTH", payload(lambda _: b'{"a":' + b"[" * 200_000)),
    Refusal(33, "a byte order mark", "JSON_BOM", payload(lambda raw: b"\xef\xbb\xbf" + raw)),
    Refusal(33, "half a surrogate pair", "JSON_SURROGATE", _path("a\ud800.json")),
    Refusal(34, "bytes behind", "JSON_TRAILING", payload(lambda raw: raw + b"{}")),
    Refusal(35, "a critical extension", "MANIFEST_CRITICAL", manifest(lambda m: m.update(critical=["x"], x=1))),
    Refusal(
        36,
        "a manifest over 32 MiB",
        "MANIFEST_TOO_LARGE",
        payload(lambda raw: raw.ljust(32 * 1024 * 1024 + 1)),
    ),
    Refusal(37, "base64 with line ends", "BASE64", _envelope_text(lambda text: text[:76] + "\n" + text[76:])),
    Refusal(37, "base64 with bits to spare", "BASE64", _envelope_text(_unused_bits)),
    Refusal(37, "base64 that is none", "BASE64", _envelope_text(lambda text: "*" + text[1:])),
)

PATHS = (
    Refusal(38, "absolute", "PATH_ABSOLUTE", _path("/etc/passwd")),
    Refusal(39, "above the folder", "PATH_TRAVERSAL", _path("../../evil.json")),
    Refusal(39, "above the folder, deeper", "PATH_TRAVERSAL", _path("a/b/../../../evil.json")),
    Refusal(40, "an empty component", "PATH_EMPTY_COMPONENT", _path("a//b.json")),
    Refusal(40, "a component '.'", "PATH_EMPTY_COMPONENT", _path("./b.json")),
    Refusal(41, "a backslash", "PATH_BACKSLASH", _path("a\\b.json")),
    Refusal(41, "a drive", "PATH_BACKSLASH", _path("C:b.json")),
    Refusal(42, "NUL", "PATH_CONTROL", _path("a.json\0.txt")),
    Refusal(42, "an escape", "PATH_CONTROL", _path("a\x1b[2J.json")),
    Refusal(42, "a name that reads backwards", "PATH_CONTROL", _path("a\u202etxt.json")),
    Refusal(43, "not UTF-8", "JSON_ENCODING", payload(_raw_path(b"caf\xe9.json"))),
    Refusal(43, "an overlong slash", "JSON_ENCODING", payload(_raw_path(b"..\xc0\xafevil.json"))),
    Refusal(44, "not NFC", "PATH_NOT_NFC", _path("cafe\u0301.json")),
    Refusal(45, "two that NFC makes one", "PATH_NORMAL_COLLISION", _paths("cafe\u0301.json", "caf\u00e9.json")),
    Refusal(45, "two that NFKC makes one", "PATH_NORMAL_COLLISION", _paths("\ufb01le.json", "file.json")),
    Refusal(46, "two that differ in case", "PATH_CASE_COLLISION", _paths("Config.json", "config.json")),
    Refusal(46, "two that fold alike", "PATH_CASE_COLLISION", _paths("stra\u00dfe.json", "STRASSE.json")),
    Refusal(47, "a file that is a folder", "PATH_PREFIX", _paths("a.json", "a.json/b.json")),
    Refusal(48, "a component over 255 bytes", "PATH_TOO_LONG", _path("\u00e9" * 126 + ".json")),
    Refusal(48, "a path over 1024 bytes", "PATH_TOO_LONG", _path("/".join(["a" * 200] * 6))),
    Refusal(49, "hidden", "PATH_HIDDEN", _path(".ssh/authorized_keys.txt")),
    Refusal(49, "of git", "PATH_HIDDEN", _path("a/.gitattributes")),
    Refusal(50, "a dot at the end", "PATH_TRAILING", _path("a.json.")),
    Refusal(50, "a space at the end", "PATH_TRAILING", _path("a /b.json")),
    Refusal(51, "a device of Windows", "PATH_DEVICE_NAME", _path("a/NUL.json")),
    Refusal(51, "a port of Windows", "PATH_DEVICE_NAME", _path("com1.safetensors")),
)


def checked(header: bytes) -> bytes:
    """A header with its checksum made right."""
    total = sum(header[:148]) + 256 + sum(header[156:])
    return header[:148] + b"%06o\0 " % total + header[156:]


def _patched(at: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda raw: checked(raw[:at] + new + raw[at + len(new) : 512]) + raw[512:]


def _typed(flag: bytes) -> Callable[[Scene], bytes]:
    return spliced("chunk", _patched(156, flag))


def _pax_override(raw: bytes) -> bytes:
    """A PAX header that renames the member behind it, as Python's tarfile believes it."""
    record = b"path=../../evil.json\n"
    record = b"%d %s" % (len(record) + 3, record)
    header = checked(_patched(124, b"%011o\0" % len(record))(_patched(156, b"x")(raw[:512])))
    return header + record.ljust(512, b"\0") + raw


def _swapped(members: Members) -> Members:
    return [*members[:-3], members[-2], members[-3], members[-1]]


def _longer_chunk(scene: Scene) -> Draft:
    name = full_chunk(scene.good)
    return scene.good.put(name, scene.good[name] + b"x")


def _end(change: Callable[[bytes], bytes]) -> Callable[[Scene], bytes]:
    return lambda scene: change(scene.raw())


CONTAINER = (
    Refusal(52, "a symbolic link", "CONTAINER_SYMLINK", _typed(b"2")),
    Refusal(53, "a hard link", "CONTAINER_HARDLINK", _typed(b"1")),
    Refusal(54, "a character device", "CONTAINER_DEVICE", _typed(b"3")),
    Refusal(54, "a block device", "CONTAINER_DEVICE", _typed(b"4")),
    Refusal(54, "a FIFO", "CONTAINER_DEVICE", _typed(b"6")),
    Refusal(55, "a GNU sparse file", "CONTAINER_SPARSE", _typed(b"S")),
    Refusal(56, "a PAX name that overrides", "CONTAINER_PAX", spliced("chunk", _pax_override)),
    Refusal(56, "a PAX header for all", "CONTAINER_PAX", _typed(b"g")),
    Refusal(56, "a GNU long name", "CONTAINER_LONG_NAME", _typed(b"L")),
    Refusal(56, "a GNU long link", "CONTAINER_LONG_NAME", _typed(b"K")),
    Refusal(57, "setuid", "CONTAINER_MODE", spliced("chunk", _patched(100, b"0004555\0"))),
    Refusal(57, "executable", "CONTAINER_MODE", spliced("chunk", _patched(100, b"0000555\0"))),
    Refusal(58, "a document twice", "CONTAINER_DUPLICATE", lambda s: s.good.insert("oms.sig", "oms.sig", b"{}")),
    Refusal(
        58,
        "a chunk twice",
        "CONTAINER_DUPLICATE",
        lambda s: s.good.insert(s.good.chunks[-1], s.good.chunks[-1], s.good[s.good.chunks[-1]]),
        early=False,
    ),
    Refusal(
        59,
        "a chunk that no file has",
        "CONTAINER_UNLISTED",
        lambda s: s.good.insert("oms.sig", f"c/{_EMPTY}", b""),
    ),
    Refusal(
        59,
        "a file behind the end",
        "CONTAINER_UNLISTED",
        lambda s: s.good.insert("end.json", "evil.sh", b"#!/bin/sh\n"),
        early=False,
    ),
    Refusal(60, "a chunk missing", "CONTAINER_MISSING", lambda s: s.good.without(s.good.chunks[-1]), early=False),
    Refusal(
        60,
        "the head alone",
        "CONTAINER_MISSING",
        lambda s: s.good.arranged(lambda m: m[: s.good.where("oms.sig") + 1]),
    ),
    Refusal(61, "chunks in another order", "CONTAINER_ORDER", lambda s: s.good.arranged(_swapped), early=False),
    Refusal(
        61,
        "a signature before what it signs",
        "CONTAINER_ORDER",
        lambda s: s.good.without("oms.sig").insert("trust/1.root.json", "oms.sig", s.good["oms.sig"]),
    ),
    Refusal(62, "a header's checksum", "CONTAINER_CHECKSUM", spliced("chunk", lambda r: r[:150] + b"7" + r[151:])),
    Refusal(62, "a header's bit", "CONTAINER_CHECKSUM", spliced("oms.sig", lambda r: b"n" + r[1:])),
    Refusal(63, "a negative size", "CONTAINER_SIZE", spliced("chunk", _patched(124, b"-0000000001\0"))),
    Refusal(
        63, "a size beyond 64 bits", "CONTAINER_SIZE", spliced("chunk", _patched(124, b"\x80" + b"\xff" * 11))
    ),
    Refusal(64, "a chunk longer than listed", "CONTAINER_MEMBER_SIZE", _longer_chunk, early=False),
    Refusal(
        64,
        "the largest size there is",
        "CONTAINER_MEMBER_SIZE",
        spliced("header.json", _patched(124, b"77777777777\0")),
    ),
    Refusal(65, "no end marker", "CONTAINER_NO_END", _end(lambda raw: raw[:-1024]), early=False),
    Refusal(65, "half an end marker", "CONTAINER_NO_END", _end(lambda raw: raw[:-512]), early=False),
    Refusal(66, "a byte after the end", "CONTAINER_TRAILING", _end(lambda raw: raw + b"\0"), early=False),
    Refusal(66, "another bundle after the end", "CONTAINER_TRAILING", _end(lambda raw: raw + raw), early=False),
)


def _compressed(scene: Scene, pack: str) -> bytes:
    import importlib

    packed: bytes = importlib.import_module(pack).compress(scene.raw())
    return packed


COMPRESSION = tuple(
    Refusal(67, pack, "CONTAINER_COMPRESSED", lambda s, pack=pack: _compressed(s, pack))
    for pack in ("gzip", "bz2", "lzma")
)


def _folder(change: Callable[[Path, Draft], object]) -> Callable[[Scene], Attack]:
    """An attack with a bundle that is a folder."""

    def forge(scene: Scene) -> Attack:
        folder = scene.write_folder(scene.good)
        change(folder, scene.good)
        return Attack(folder)

    return forge


def _member_elsewhere(folder: Path, bundle: Draft) -> None:
    """A member that is a link to the very same bytes beside the bundle."""
    name = full_chunk(bundle)
    elsewhere = (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(elsewhere)


def _member_of_two_names(folder: Path, bundle: Draft) -> None:
    (folder.parent / "second").hardlink_to(folder / full_chunk(bundle))


def _member_fifo(folder: Path, bundle: Draft) -> None:
    (folder / full_chunk(bundle)).unlink()
    os.mkfifo(folder / full_chunk(bundle))


def _folder_elsewhere(folder: Path, bundle: Draft) -> None:
    (folder / "c").rename(folder.parent / "c")
    (folder / "c").symlink_to(folder.parent / "c")


FOLDERS = (
    Refusal(52, "a member that is a link", "CONTAINER_SYMLINK", _folder(_member_elsewhere), early=False),
    Refusal(52, "a folder of members that is a link", "CONTAINER_SYMLINK", _folder(_folder_elsewhere)),
    Refusal(53, "a member of two names", "CONTAINER_HARDLINK", _folder(_member_of_two_names), early=False),
    Refusal(54, "a member that is a FIFO", "CONTAINER_DEVICE", _folder(_member_fifo), early=False),
    Refusal(
        57,
        "a member that is setuid",
        "CONTAINER_MODE",
        _folder(lambda folder, bundle: (folder / full_chunk(bundle)).chmod(0o4755)),
        early=False,
    ),
    Refusal(
        59,
        "a file that no manifest lists",
        "CONTAINER_UNLISTED",
        _folder(lambda folder, _: (folder / "autorun.inf").write_bytes(b"x")),
    ),
    Refusal(
        59,
        "a chunk in the folder that no file has",
        "CONTAINER_UNLISTED",
        _folder(lambda folder, _: (folder / "c" / _EMPTY).write_bytes(b"")),
    ),
    Refusal(
        60,
        "a chunk missing in the folder",
        "CONTAINER_MISSING",
        _folder(lambda folder, bundle: (folder / full_chunk(bundle)).unlink()),
        early=False,
    ),
)


def _volumes(*order: int, verified: Site | None = None) -> Callable[[Scene], Attack]:
    """A bundle in two volumes: the first that is named is imported, the others are offered."""

    def forge(scene: Scene) -> Attack:
        first, *others = (scene.write(scene.good.split()[n - 1], f"volume-{n}") for n in order)
        return Attack(first, volumes=tuple(others), verified=verified)

    return forge


def _volume_of_another(scene: Scene) -> Attack:
    first, _ = scene.good.split()
    _, second = scene.base.split()
    return Attack(scene.write(first, "first"), volumes=(scene.write(second, "second"),))


VOLUMES = (
    Refusal(27, "a volume of another bundle", "VOLUME_MIXED", _volume_of_another, early=False),
    Refusal(68, "a volume missing", "VOLUME_MISSING", _volumes(1, verified=Site(datetime.now(UTC))), early=False),
    Refusal(68, "a volume repeated", "VOLUME_ORDER", _volumes(1, 1), early=False),
    Refusal(68, "the last volume first", "VOLUME_ORDER", _volumes(2)),
)


def _too_many_files(scene: Scene) -> Draft:
    """100 001 empty files: the manifest alone is legal in size."""
    entry = f'"size":0,"sha256":"{_EMPTY}","media_type":"text/plain","role":"document","chunks":[]'
    files = ",".join(f'{{"path":"{number:06}.txt",{entry}}}' for number in range(100_001))
    fields = scene.good.manifest | {"files": [], "total_size": 0}
    return scene.good.stated(encoded(fields).replace(b'"files": []', b'"files": [%s]' % files.encode()))


def more_than_free(scene: Scene) -> Draft:
    """One file more, with more bytes than the disk has free."""
    free = os.statvfs(scene.folder)
    chunk_size = 64 * 1024 * 1024
    chunks = free.f_bavail * free.f_frsize // chunk_size + 1024
    entry = {
        "path": "large.safetensors",
        "size": chunks * chunk_size,
        "sha256": _EMPTY,
        "media_type": "application/vnd.safetensors",
        "role": "weights",
        "chunks": [_EMPTY] * chunks,
    }

    def enlarge(fields: Fields) -> None:
        for file in fields["files"]:
            file["chunks"] = [file["sha256"]] if file["size"] else []
        files = sorted([*fields["files"], entry], key=lambda file: str(file["path"]))
        fields.update(files=files, chunk_size=chunk_size, total_size=sum(int(file["size"]) for file in files))

    draft = scene.good.described(enlarge)
    return draft.with_oms(draft.statement())


def _with_little_left(place: Workplace) -> Workplace:
    """The same store, whose quota ends a few bytes on."""
    return replace(place, store=Store(place.store.root, quota=place.store.usage().bytes + 1000))


def _on_streaming(act: Callable[[], None]) -> Callable[[Progress], None]:
    """Do it once, when the first chunk is asked for."""
    done: list[bool] = []

    def watch(progress: Progress) -> None:
        if progress.state is State.STREAMING and not done:
            done.append(True)
            act()

    return watch


def _cut_while_read(scene: Scene) -> Attack:
    path = scene.write(scene.good)
    size = header_at(scene.good, scene.good.chunks[-1])
    return Attack(path, watch=_on_streaming(lambda: os.truncate(path, size)))


def _pulled_while_read(scene: Scene) -> Attack:
    path = scene.write(scene.good)
    return Attack(path, around=Pulled(scene.folder, after=header_at(scene.good, scene.good.chunks[1])))


def _grown_while_read(scene: Scene) -> Attack:
    path = scene.write(scene.good)

    def grow() -> None:
        with path.open("ab") as stream:
            stream.write(b"more")

    return Attack(path, watch=_on_streaming(grow))


def _linked(scene: Scene) -> Attack:
    link = scene.folder / "link.bundle"
    link.symlink_to(scene.write(scene.good))
    return Attack(link)


MEDIA = (
    Refusal(69, "more than the disk has free", "STORE_SPACE", more_than_free),
    Refusal(
        69,
        "more than the site allows",
        "STORE_QUOTA",
        lambda s: Attack(s.write(s.good), site=_with_little_left),
    ),
    Refusal(70, "over 100 000 files", "MANIFEST_FILES", _too_many_files),
    Refusal(71, "cut while it is read", "SOURCE_CHANGED", _cut_while_read, early=False),
    Refusal(71, "pulled while it is read", "SOURCE_UNREADABLE", _pulled_while_read, early=False),
    Refusal(72, "a symbolic link", "SOURCE_SYMLINK", _linked),
    Refusal(72, "growing while it is read", "SOURCE_CHANGED", _grown_while_read, early=False),
)
