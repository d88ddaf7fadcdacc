"""`cloister key`: client certificates and API keys of tenants' applications."""

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from appliance.cli.arguments import positive
from appliance.cli.output import emit, plain, printable, table
from appliance.client.admin import AdminClient
from appliance.client.credentials import FILES, Credentials, check_vacant, write_credentials
from appliance.client.enrol import make_csr
from appliance.protos import admin_pb2


def register(parser: argparse.ArgumentParser) -> None:
    """The verbs of `cloister key`."""
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    issue = verbs.add_parser("issue", help="issue a certificate and an API key to an application of a tenant")
    issue.add_argument("--tenant", required=True, metavar="TENANT")
    issue.add_argument("--app", required=True, metavar="NAME", help="the application; one name, one identity")
    issue.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="a new directory for the credentials"
    )
    issue.add_argument(
        "--days", type=positive, default=0, metavar="N", help="days until they expire; default tenants.key_days"
    )
    issue.add_argument(
        "--address", metavar="HOST:PORT", help="how the application reaches the gateway, when not as it listens"
    )
    issue.set_defaults(run=_issue)
    keys = verbs.add_parser("list", help="the keys, never their secrets")
    keys.add_argument("--tenant", default="", metavar="TENANT", help="of this tenant alone")
    keys.set_defaults(run=_list)
    revoke = verbs.add_parser("revoke", help="revoke a key and its certificate, at once")
    revoke.add_argument("key_id", metavar="KEY_ID")
    revoke.set_defaults(run=_revoke)


def _issue(args: argparse.Namespace) -> int:
    """The private key is made here and stays here; what the appliance sends back is shown once, into files.

    That files can be written is tried before a key is issued; a key whose files could not be written is revoked.
    """
    os.umask(0o077)
    check_vacant(args.out)
    private_key, request = make_csr(args.tenant, args.app)
    with _folder(args.out), AdminClient(args.home) as admin:
        issued = admin.tenants.IssueKey(
            admin_pb2.IssueKeyRequest(
                tenant=args.tenant, application=args.app, csr_pem=request, valid_days=args.days
            )
        )
        address = args.address or issued.gateway_address
        try:
            write_credentials(
                args.out, Credentials(address, issued.ca_pem, issued.certificate_pem, private_key, issued.api_key)
            )
        except BaseException:
            admin.tenants.RevokeKey(admin_pb2.RevokeKeyRequest(key_id=issued.key_id))
            raise
    expires = issued.expires_at.ToJsonString()
    value = {"key_id": issued.key_id, "expires_at": expires, "directory": str(args.out), "address": address}
    text = f"key {issued.key_id} written to {printable(str(args.out))}; expires {expires[:10]}"
    emit(args, value, text)
    return 0


@contextmanager
def _folder(out: Path) -> Iterator[None]:
    """A folder without credentials that files can be written in; after an error it is as it was before.

    Raises:
        OSError: it cannot be made, or not be written in.
    """
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with tempfile.NamedTemporaryFile(dir=out) as trial:
            trial.write(bytes(64 << 10))
        yield
    except BaseException:
        for name in FILES:
            (out / name).unlink(missing_ok=True)
        if made:
            out.rmdir()
        raise


def _list(args: argparse.Namespace) -> int:
    with AdminClient(args.home) as admin:
        keys = admin.tenants.ListKeys(admin_pb2.ListKeysRequest(tenant=args.tenant)).keys
    rows = [
        (
            k.key_id,
            k.tenant,
            k.application,
            k.state,
            k.created_at.ToJsonString()[:10],
            k.expires_at.ToJsonString()[:10],
        )
        for k in keys
    ]
    header = ("key", "tenant", "application", "state", "issued", "expires")
    emit(
        args, [plain(k) for k in keys], table(header, rows) if rows else "no keys; `cloister key issue` makes one"
    )
    return 0


def _revoke(args: argparse.Namespace) -> int:
    with AdminClient(args.home) as admin:
        admin.tenants.RevokeKey(admin_pb2.RevokeKeyRequest(key_id=args.key_id))
    emit(args, {"revoked": args.key_id}, f"{printable(args.key_id)} revoked")
    return 0
