"""`cloister bundle list`, `imports`, `cancel`, `remove`, `scrub`, `store`: imports looked after, and the store."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc

from appliance.cli.output import emit, emit_line, plain, printable, size, table
from appliance.cli.progress import ProgressBar
from appliance.client.admin import AdminClient
from appliance.errors import CloisterError
from appliance.protos import admin_pb2

Verbs = argparse._SubParsersAction  # the type of what add_subparsers returns has no public name

_DIGEST_SHOWN = 12
_ID_SHOWN = 8
ENDED = ("committed", "rejected")
"""States of an import that are its last."""
_REPAIR = "importing the same bundle again repairs it"


def register_verbs(verbs: "Verbs[argparse.ArgumentParser]") -> None:
    """Add these verbs to `cloister bundle`."""
    imports = verbs.add_parser("imports", help="the imports that run or wait, and the last that ended")
    imports.set_defaults(run=_imports)
    cancel = verbs.add_parser("cancel", help="end a running import; what it verified stays for the next one")
    cancel.add_argument("name", metavar="IMPORT", help="its id, the beginning of it, or the bundle's path")
    cancel.set_defaults(run=_cancel)
    verbs.add_parser("list", help="the model versions in the store, and where each stands").set_defaults(run=_list)
    remove = verbs.add_parser("remove", help="forget a model version that nothing runs, and free its space")
    remove.add_argument("version", metavar="MODEL", help="name@version or a digest")
    remove.set_defaults(run=_remove)
    scrub = verbs.add_parser("scrub", help="hash every file of the store again and report what has changed")
    scrub.set_defaults(run=_scrub)
    verbs.add_parser("store", help="what the store holds, and what its last scrub found").set_defaults(run=_store)


def notes_of(version: admin_pb2.ModelVersion) -> Iterator[str]:
    """What needs attention about a version, a line each."""
    name = printable(f"{version.name}@{version.version}")
    if version.revoked:
        yield f"{name} is REVOKED: {version.revoked}; it is not loaded again"
    if version.damaged:
        files = ", ".join(map(printable, version.damaged[:3]))
        yield f"{name} is DAMAGED: {len(version.damaged)} file(s), {files}; {_REPAIR}"
    if version.state == "committed":
        wanted = version.approvals_required
        yield f"{name}: {len(version.approvals)} of {wanted} custodians approved it; cloister model approve"
    if version.requires:
        yield f"{name} ({version.kind}) needs {', '.join(map(printable, version.requires))}"
    if version.aliases:
        yield f"{name} answers {', '.join(map(printable, version.aliases))}"


def _list(args: argparse.Namespace) -> int:
    with AdminClient(args.home) as admin:
        found = admin.models.ListModelVersions(admin_pb2.ListModelVersionsRequest()).versions
    rows = [
        (
            f"{v.name}@{v.version}", v.sequence, v.kind, size(v.total_size), v.state, len(v.signers),
            v.model_digest[:_DIGEST_SHOWN],
        )
        for v in found
    ]  # fmt: skip
    header = ("model", "seq", "kind", "size", "state", "signers", "digest")
    notes = [note for version in found for note in notes_of(version)]
    text = "\n".join([table(header, rows), *notes])
    emit(args, [plain(v) for v in found],
         text if rows else "no model versions; `cloister bundle import` brings one in")  # fmt: skip
    return 0


def _imports(args: argparse.Namespace) -> int:
    with AdminClient(args.home) as admin:
        found = admin.models.ListImports(admin_pb2.ListImportsRequest()).imports
    lines = []
    for one in found:
        told = one.progress
        began = one.started_at.ToDatetime().strftime("%Y-%m-%d %H:%M")
        head = f"{told.import_id[:_ID_SHOWN]}  {began}  {_standing(told)}"
        lines += [head, f"          {printable(one.path)}"]
    text = "\n".join(lines) or "no imports; `cloister bundle import` begins one"
    emit(args, [plain(one) for one in found], text)
    return 0


def _standing(told: admin_pb2.ImportBundleResponse) -> str:
    """Where an import is, in one line."""
    what = printable(told.model_version) or told.kind
    parts = [told.state, f"{100 * told.bytes_done // told.bytes_total}%" if told.bytes_total else "", what]
    if told.state not in ENDED and told.bytes_per_second:
        parts.append(f"{size(told.bytes_per_second)}/s")
    if told.volume_wanted:
        parts.append(f"waits for volume {told.volume_wanted} of {told.volumes}")
    return "  ".join(filter(None, [*parts, told.reason]))


def _cancel(args: argparse.Namespace) -> int:
    with AdminClient(args.home) as admin:
        found = admin.models.ListImports(admin_pb2.ListImportsRequest()).imports
        import_id = _named(found, args.name)
        admin.models.CancelImport(admin_pb2.CancelImportRequest(import_id=import_id))
    emit(
        args, {"cancelled": import_id}, f"import {import_id[:_ID_SHOWN]} has ended; what it verified stays staged"
    )
    return 0


def _named(imports: Iterable[admin_pb2.Import], name: str) -> str:
    """The id of the one running import that `name` means.

    Raises:
        CloisterError: IMPORT_NOT_FOUND, there is none, or several.
    """
    running = [one for one in imports if one.progress.state not in ENDED]
    path = str(Path(name).expanduser().absolute())
    meant = [o.progress.import_id for o in running if o.path == path or o.progress.import_id.startswith(name)]
    if len(meant) != 1:
        raise CloisterError(
            "IMPORT_NOT_FOUND",
            f"{len(meant)} running imports are meant by that; `cloister bundle imports` names them",
            grpc.StatusCode.NOT_FOUND,
        )
    return meant[0]


def _remove(args: argparse.Namespace) -> int:
    with AdminClient(args.home) as admin:
        request = admin_pb2.RemoveModelVersionRequest(model_version=args.version)
        removed = admin.models.RemoveModelVersion(request)
    emit(args, plain(removed), f"{printable(removed.model_version)} removed, {size(removed.freed_bytes)} freed")
    return 0


def _scrub(args: argparse.Namespace) -> int:
    bar = ProgressBar()
    last = admin_pb2.ScrubStoreResponse()
    try:
        with AdminClient(args.home) as admin:
            stream: Iterator[admin_pb2.ScrubStoreResponse]
            stream = admin.models.ScrubStore(admin_pb2.ScrubStoreRequest())
            for last in stream:
                bar.update("scrub", last.bytes_done, last.bytes_total)
    finally:
        bar.close()
    damage = _damage(last.damaged)
    emit_line(args, plain(last), damage or f"{size(last.bytes_done)} hashed; every file is what was imported")
    if damage:
        raise CloisterError(
            "STORE_DAMAGED", f"{len(last.damaged)} file(s) are not what was imported; {_REPAIR}",
            grpc.StatusCode.DATA_LOSS,
        )  # fmt: skip
    return 0


def _store(args: argparse.Namespace) -> int:
    with AdminClient(args.home) as admin:
        store = admin.models.GetStore(admin_pb2.GetStoreRequest())
    scrubbed = f"{store.scrubbed_at.ToDatetime():%Y-%m-%d %H:%M} UTC" if store.HasField("scrubbed_at") else "never"
    quota = size(store.quota_bytes) if store.quota_bytes else "none"
    lines = [
        f"holds       {size(store.bytes)} in {store.files:,} files; versions list {size(store.listed_bytes)}",
        f"free        {size(store.free_bytes)}, quota {quota}",
        f"staged      {size(store.staged_bytes)} of interrupted imports",
        f"scrubbed    {scrubbed}",
    ]
    emit(args, plain(store), "\n".join(filter(None, [*lines, _damage(store.damaged)])))
    return 0


def _damage(found: Iterable[admin_pb2.DamagedFile]) -> str:
    return "\n".join(
        f"DAMAGED     {file.sha256[:_DIGEST_SHOWN]} {file.finding}: {', '.join(map(printable, file.used_by))}"
        for file in found
    )
