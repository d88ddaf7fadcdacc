"""`cloister bundle import`: a bundle's way in, watched, with the next volume asked for; it runs on without us."""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import grpc

from appliance.cli import bundle_store
from appliance.cli.failure import UsageError
from appliance.cli.output import emit_line, plain, printable, size
from appliance.cli.progress import ProgressBar
from appliance.client.admin import AdminClient
from appliance.errors import CloisterError
from appliance.protos import admin_pb2
from bundles.format.errors import BundleError

_INTERRUPTED = 130
_SUFFIX_DIGITS = 3
_LINE_EVERY_S = 1.0
_GONE = "IMPORTER_UNAVAILABLE"
_BACK_WITHIN_S, _LOOK_EVERY_S = 60.0, 0.5
_NOT_ASKED_AGAIN = {"VOLUME_NOT_WANTED", "IMPORT_NOT_FOUND", _GONE}
"""Somebody else handed the volume over, or the import has ended: its progress tells."""


Verbs = argparse._SubParsersAction  # the type of what add_subparsers returns has no public name


def register_verbs(verbs: "Verbs[argparse.ArgumentParser]") -> None:
    """Add the verbs of `cloister bundle` that need the running appliance."""
    load = verbs.add_parser(
        "import", help="verify a bundle and store the model version in it; or a trust bundle of a few KB"
    )
    load.add_argument("path", type=Path, metavar="BUNDLE", help="a file, its first volume, or a folder")
    load.add_argument(
        "--volume",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="a further volume that does not lie beside the first; may be repeated",
    )
    load.set_defaults(run=import_bundle)
    bundle_store.register_verbs(verbs)


def import_bundle(args: argparse.Namespace) -> int:
    """Import a bundle, or watch the import of it that runs; the exit status."""
    path = _utf8(args.path.absolute())
    offered = [_utf8(volume.absolute()) for volume in args.volume]
    with AdminClient(args.home) as admin:
        watch = Watch(admin, args, path, offered)
        try:
            last = watch.follow()
        except KeyboardInterrupt:
            watch.bar.close()
            print(f"\nthe import goes on; to watch it again: {_again(path)}, or cloister bundle imports",
                  file=sys.stderr)  # fmt: skip
            return _INTERRUPTED
        finally:
            watch.bar.close()
    if last.state != "committed":
        message = last.message or f"the import of {path} ended in state {last.state or 'unknown'}; import it again"
        raise BundleError(last.reason or "IMPORT_INCOMPLETE", message)
    emit_line(args, plain(last), done(last))
    return 0


class Watch:
    """One import as it goes: a bar on a terminal, lines elsewhere, and volumes handed over when they are wanted.

    Args:
        admin: the appliance.
        args: of the command.
        path: of the bundle.
        volumes: named on the command line, not offered yet.
    """

    def __init__(self, admin: AdminClient, args: argparse.Namespace, path: str, volumes: list[str]) -> None:
        self._admin = admin
        self._args = args
        self._path = path
        self._volumes = volumes
        self._asked = 0
        self._line = ("", 0, "")
        self._told_at = float("-inf")
        self.bar = ProgressBar()

    def follow(self) -> admin_pb2.ImportBundleResponse:
        """Progress to the end; the last of it.

        Raises:
            CloisterError: VOLUME_WANTED, nobody is here to name the next volume; the import waits on.
        """
        last = admin_pb2.ImportBundleResponse()
        for last in self._told():
            self._show(last)
            if last.volume_wanted and last.volume_wanted != self._asked:
                self._asked = last.volume_wanted
                self._hand_over(last)
            elif not last.volume_wanted:
                self._asked = 0
        return last

    def _told(self) -> Iterator[admin_pb2.ImportBundleResponse]:
        """What the importer tells. One that dies or stops is waited for: the next goes on with the same import."""
        import_id = ""
        while True:
            stream: Iterator[admin_pb2.ImportBundleResponse]
            stream = self._admin.models.ImportBundle(admin_pb2.ImportBundleRequest(path=self._path))
            try:
                for told in stream:
                    import_id = told.import_id
                    yield told
                return
            except CloisterError as lost:
                if not import_id or lost.code != _GONE:
                    raise
                found = self._find_again(import_id, lost)
            self._asked = 0
            if found.state in bundle_store.ENDED:
                yield found
                return

    def _find_again(self, import_id: str, lost: CloisterError) -> admin_pb2.ImportBundleResponse:
        """Where the import is, once the importer is back.

        Raises:
            CloisterError: `lost`, it is not back in time, or does not know the import.
        """
        self.bar.close()
        print("the importer is away; the import goes on once it is back", file=sys.stderr)
        deadline = time.monotonic() + _BACK_WITHIN_S
        while time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)
            try:
                listed = self._admin.models.ListImports(admin_pb2.ListImportsRequest()).imports
            except CloisterError as still:
                if still.code != _GONE:
                    raise
                continue
            for one in listed:
                if one.progress.import_id == import_id:
                    return one.progress
            break
        raise lost

    def _show(self, told: admin_pb2.ImportBundleResponse) -> None:
        state = f"volume {told.volume_wanted}?" if told.volume_wanted else told.state
        if not self._args.json:
            self.bar.update(state, told.bytes_done, told.bytes_total, told.file, told.bytes_per_second or None)
            return
        line = (told.state, told.volume_wanted, told.volume_refused)
        late = time.monotonic() - self._told_at >= _LINE_EVERY_S
        if (late or line != self._line) and told.state not in ("committed", "rejected"):
            self._line, self._told_at = line, time.monotonic()
            emit_line(self._args, plain(told), "")

    def _hand_over(self, told: admin_pb2.ImportBundleResponse) -> None:
        """Offer volumes until one is taken: first those named already, then what the operator names."""
        for volume in list(self._volumes):
            refused = self._offer(told.import_id, volume, quiet=True)
            if refused == _GONE:
                return
            if not refused:
                self._volumes.remove(volume)
                return
        if self._args.json or not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise CloisterError(
                "VOLUME_WANTED",
                f"the import waits for volume {told.volume_wanted} of {told.volumes}: "
                f"{_again(self._path)} --volume VOLUME goes on with it",
                grpc.StatusCode.FAILED_PRECONDITION,
                {"import_id": told.import_id, "volume": str(told.volume_wanted)},
            )
        self.bar.close()
        while self._offer(told.import_id, _ask(told, self._path), quiet=False) not in {"", *_NOT_ASKED_AGAIN}:
            pass

    def _offer(self, import_id: str, volume: str, quiet: bool) -> str:
        """Why a volume was not taken, as a code, told on standard error but for a wrong one of several."""
        try:
            self._admin.models.OfferVolume(admin_pb2.OfferVolumeRequest(import_id=import_id, path=volume))
        except CloisterError as error:
            if error.code == _GONE:  # the import's own stream ends as well, and waits for the next importer
                return _GONE
            if error.status is grpc.StatusCode.UNAVAILABLE:
                raise
            if not (quiet and error.code == "VOLUME_ORDER"):
                print(printable(f"not taken: {error.code}: {error.message}"), file=sys.stderr)
            return error.code
        return ""


def done(last: admin_pb2.ImportBundleResponse) -> str:
    """What a committed import did, in words."""
    if last.kind == "trust":
        return "trust bundle accepted; `cloister trust show` has what is in force"
    version = f"{printable(last.model_version)}, digest {last.model_digest[:16]}"
    if last.bytes_done < last.bytes_total:
        return f"{version}: in the store already; the payload of this bundle was not read"
    reused = f", {size(last.bytes_reused)} of it were here already" if last.bytes_reused else ""
    return f"{version}: imported, {size(last.bytes_done)}{reused}"


def _ask(told: admin_pb2.ImportBundleResponse, path: str, stream: TextIO | None = None) -> str:
    """The path of the next volume, from whoever sits at the terminal; an empty answer is the one proposed."""
    likely = _likely(path, told.volume_wanted)
    shown = f" [{printable(likely)}]" if likely else ""
    print(f"volume {told.volume_wanted} of {told.volumes} is wanted; insert its medium, then name it{shown}: ",
          end="", file=stream or sys.stderr, flush=True)  # fmt: skip
    line = sys.stdin.readline()
    if not line:
        raise KeyboardInterrupt
    answer = line.strip() or likely
    return str(Path(answer).expanduser().absolute()) if answer else _ask(told, path, stream)


def _likely(path: str, volume: int) -> str:
    """`X.bundle.001` as volume 2: `X.bundle.002`, as volume 1 itself; empty where the name tells nothing."""
    if volume == 1:
        return path
    stem, dot, digits = path.rpartition(".")
    numbered = dot and len(digits) >= _SUFFIX_DIGITS and digits.isdecimal()
    return f"{stem}.{volume:0{len(digits)}d}" if numbered else ""


def _again(path: str) -> str:
    return f"cloister bundle import {printable(path)}"


def _utf8(path: Path) -> str:
    """A path as the protocol can carry it.

    Raises:
        UsageError: a folder above, which nobody typed, is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError(f"{path} is not UTF-8; import the bundle from another folder") from None
    return str(path)
