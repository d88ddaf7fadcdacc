"""`cloister bundle import` and `bundle list`: the verbs of `bundle` that need the running appliance."""

import argparse
from pathlib import Path

from appliance.cli.failure import UsageError
from appliance.cli.output import emit, plain, printable, size, table
from appliance.cli.progress import ProgressBar
from appliance.client.admin import AdminClient
from appliance.protos import admin_pb2
from bundles.format.errors import BundleError

Verbs = argparse._SubParsersAction  # the type of what add_subparsers returns has no public name


def register_verbs(verbs: "Verbs[argparse.ArgumentParser]") -> None:
    """Add `import` and `list` to the verbs of `cloister bundle`."""
    load = verbs.add_parser("import", help="verify a bundle and store the model version in it")
    load.add_argument("path", type=Path, metavar="BUNDLE")
    load.set_defaults(run=_import)
    verbs.add_parser("list", help="the model versions in the store").set_defaults(run=_list)


def _import(args: argparse.Namespace) -> int:
    path = args.path.absolute()
    try:
        request = admin_pb2.ImportBundleRequest(path=str(path))
    except ValueError:  # of a folder above, which nobody typed
        raise UsageError(f"{path} is not UTF-8; import the bundle from another folder") from None
    bar = ProgressBar()
    last = admin_pb2.ImportBundleResponse()
    try:
        with AdminClient(args.home) as admin:
            for last in admin.models.ImportBundle(request):
                bar.update(last.state, last.bytes_done, last.bytes_total, last.file)
    finally:
        bar.close()
    if last.state != "committed":
        message = last.message or f"the import of {path} ended in state {last.state or 'unknown'}; import it again"
        raise BundleError(last.reason or "IMPORT_INCOMPLETE", message)
    emit(args, plain(last), _done(last))
    return 0


def _done(last: admin_pb2.ImportBundleResponse) -> str:
    """What a committed import did, in words."""
    version = f"{printable(last.model_version)}, digest {last.model_digest[:16]}"
    if last.bytes_done < last.bytes_total:
        return f"{version}: in the store already; the payload of this bundle was not read"
    return f"{version}: imported, {size(last.bytes_done)}"


def _list(args: argparse.Namespace) -> int:
    with AdminClient(args.home) as admin:
        versions = admin.models.ListModelVersions(admin_pb2.ListModelVersionsRequest()).versions
    rows = [
        (
            f"{v.name}@{v.version}",
            v.sequence,
            v.kind,
            size(v.total_size),
            v.architecture,
            v.imported_at.ToDatetime().strftime("%Y-%m-%d %H:%M"),
            v.model_digest[:16],
        )
        for v in versions
    ]
    header = ("model", "sequence", "kind", "size", "architecture", "imported", "digest")
    text = table(header, rows) if rows else "no model versions; `cloister bundle import` brings one in"
    emit(args, [plain(v) for v in versions], text)
    return 0
