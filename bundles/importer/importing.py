"""One import, from an open file to a committed version or a refusal. Synchronous; runs on a thread of its own.

Order of durability: files under their digests, new trust roots, the record, one transaction in store.db (this is
the commit), the floors. A crash before the transaction leaves the old state and unreferenced files; after it, the
new state, and starting again completes the floors.
"""

import errno
import hashlib
import logging
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from bundles.content.inspector import Inspector
from bundles.durable import write_file
from bundles.format.errors import BundleError
from bundles.format.manifest import Manifest, parse_time
from bundles.format.source import beside
from bundles.importer import floors
from bundles.importer.floors import Floors
from bundles.importer.ledger import Ledger, ModelVersion
from bundles.pipeline import Accepted, Progress, Report, State, Terms, read_bundle
from bundles.reader import BundleReader
from bundles.store import Staging, Store
from bundles.trust import roots
from bundles.trust.policy import Floor, Site, Verified, check_policy

log = logging.getLogger(__name__)


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Workplace:
    """Where imports happen.

    Attributes:
        trust: folder of trust roots and floors.
        store: the model store.
        ledger: store.db.
        inspector: runs engine-inspect.
        now: the clock.
        appliance: this appliance's name, for bundles that name their targets.
    """

    trust: Path
    store: Store
    ledger: Ledger
    inspector: Inspector
    now: Callable[[], datetime] = _now
    appliance: str = ""

    @classmethod
    def open(cls, home: Path, inspector: Inspector | None = None) -> "Workplace":
        """The workplace in a home directory, cleared of what a dead process left.

        `trust/site`, which init writes, has the appliance's name.

        Raises:
            BundleError: FLOORS_DAMAGED, LEDGER_NEWER.
        """
        store = Store(home / "store")
        (home / "trust").mkdir(mode=0o700, exist_ok=True)
        place = cls(
            home / "trust",
            store,
            Ledger(home / "store" / "store.db"),
            inspector or Inspector(),
            appliance=_site_name(home / "trust" / "site"),
        )
        place.ledger.reject_unfinished()
        store.sweep((version.name, version.sequence) for version in place.ledger.versions())
        floors.save(place.trust / "floors.json", place.floors())
        return place

    def floors(self) -> Floors:
        """The higher of the floors in the file and in the database."""
        held = floors.load(self.trust / "floors.json")
        models = dict(held.models)
        for name, floor in self.ledger.floors().models.items():
            if name not in models or floor.sequence > models[name].sequence:
                models[name] = floor
        return Floors(models, held.clock)

    def site(self) -> Site:
        """What a manifest is judged against now."""
        held = self.floors()
        return Site(self.now(), held.clock, tuple(held.models.items()), self.appliance)


def _site_name(path: Path) -> str:
    """The name in the file; empty when there is none."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""


def import_bundle(place: Workplace, import_id: str, path: Path, report: Report) -> Progress:
    """Import one bundle; its final progress, committed or rejected. Every state change is in the outbox.

    Args:
        place: where.
        import_id: a new one.
        path: the bundle.
        report: is told the progress; may raise BundleError to stop the import.
    """
    place.ledger.begin(import_id, path)
    run = _Import(place, import_id, report)
    try:
        return run.carry_out(path)
    except BundleError as error:
        return run.reject(error)
    except OSError as error:
        log.warning("import failed", extra={"import_id": import_id, "errno": error.errno})
        code = "STORE_SPACE" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "STORE_IO"
        return run.reject(BundleError(code, f"the store cannot be written: {error.strerror}"))
    except sqlite3.Error:
        raise  # the record itself cannot be written; the caller ends the process
    except Exception as error:
        log.exception("import failed", extra={"import_id": import_id})
        kind = type(error).__name__
        return run.reject(BundleError("INTERNAL", f"a defect, {kind}; the importer's log says where"))


class _Import:
    """The progress of one import, recorded where it changes."""

    def __init__(self, place: Workplace, import_id: str, report: Report) -> None:
        self._place = place
        self._import_id = import_id
        self._report = report
        self._at = Progress(State.QUARANTINE)

    def carry_out(self, path: Path) -> Progress:
        place = self._place
        reader = BundleReader(beside(path))
        try:
            staging = Staging(place.store, self._import_id)
            try:
                terms = Terms(roots.load_pinned(place.trust), place.now(), self._gate, place.inspector)
                passed = read_bundle(reader, terms, staging, self._advance)
                return self._done() if isinstance(passed, Verified) else self._commit(passed, staging)
            finally:
                staging.close()
        finally:
            reader.close()

    def reject(self, error: BundleError) -> Progress:
        """Record the refusal, unless the import is committed: then nothing takes that back."""
        if self._at.state is State.COMMITTED:
            return self._at
        rejected = replace(self._at, state=State.REJECTED, reason=error.code, message=error.message)
        self._place.ledger.change(self._import_id, rejected)
        self._report(rejected)
        return rejected

    def _advance(self, progress: Progress) -> None:
        if progress.state is not self._at.state:
            self._place.ledger.change(self._import_id, progress)
        self._at = progress
        self._report(progress)

    def _gate(self, verified: Verified) -> bool:
        """False when this very bundle is committed and whole; a damaged store is filled again from it."""
        place, manifest = self._place, verified.manifest
        committed = place.ledger.find(verified.model_digest)
        if committed is None:
            check_policy(verified, place.site())
            self._check_names(manifest)
        elif self._whole(committed):
            return False
        place.store.check_space(manifest.total_size)
        return True

    def _whole(self, version: ModelVersion) -> bool:
        """Whether the store has every byte of a version; reading them shows as progress and can be interrupted."""
        at = self._at

        def read(count: int) -> None:
            done = min(at.bytes_total, self._at.bytes_done + count)
            self._advance(replace(at, bytes_done=done, file="(in the store)"))

        return self._place.store.whole([*version.digests()], read)

    def _check_names(self, manifest: Manifest) -> None:
        if self._place.ledger.find(manifest.reference) is not None:
            raise BundleError(
                "VERSION_REUSED", f"another {manifest.reference} was imported; give this one a new name"
            )

    def _commit(self, accepted: Accepted, staging: Staging) -> Progress:
        place, verified = self._place, accepted.verified
        evidence = self._keep_evidence(accepted, staging)
        staging.publish()
        for root in verified.new_roots:
            write_file(place.trust / f"{root.version}.root.json", root.raw)
        known = place.ledger.find(verified.model_digest)
        imported_at = known.imported_at if known else int(place.now().timestamp())
        version = _version_of(verified, imported_at, evidence)
        place.store.write_record(version.name, version.sequence, version.as_dict())
        committed = replace(self._at, state=State.COMMITTED, file="")
        place.ledger.commit(self._import_id, committed, version)
        self._at = committed
        try:
            self._raise_floors(verified)
        except (OSError, BundleError) as error:  # the database has the floor; the next start writes the file
            log.error("floors are not written", extra={"import_id": self._import_id, "error": str(error)})
        self._report(committed)
        return committed

    def _done(self) -> Progress:
        """Nothing was to do: the same bundle is in the store. The payload offered now was not read."""
        committed = replace(self._at, state=State.COMMITTED, bytes_done=0, file="")
        self._place.ledger.change(self._import_id, committed)
        self._at = committed
        self._report(committed)
        return committed

    def _keep_evidence(self, accepted: Accepted, staging: Staging) -> dict[str, str]:
        """The signed documents themselves, byte for byte, for whoever verifies again."""
        evidence = {document.member: document.sha256 for document in accepted.verified.manifest.documents}
        for name, content in (
            ("manifest.dsse.json", accepted.head.envelope),
            ("oms.sig", accepted.head.oms or b""),
        ):
            evidence[name] = hashlib.sha256(content).hexdigest()
            staging.keep(evidence[name], content)
        return evidence

    def _raise_floors(self, verified: Verified) -> None:
        manifest = verified.manifest
        floor = Floor(manifest.sequence, verified.model_digest)
        raised = self._place.floors().raised(manifest.name, floor, parse_time(manifest.issued_at))
        floors.save(self._place.trust / "floors.json", raised)


def _version_of(verified: Verified, imported_at: int, evidence: dict[str, str]) -> ModelVersion:
    manifest = verified.manifest
    return ModelVersion(
        name=manifest.name,
        version=manifest.version,
        sequence=manifest.sequence,
        model_digest=verified.model_digest,
        kind=manifest.kind,
        imported_at=imported_at,
        signers=(*verified.signers, *verified.publishers),
        total_size=manifest.total_size,
        architecture=manifest.model.architecture,
        files=tuple({"path": f.path, "size": f.size, "sha256": f.sha256} for f in manifest.files),
        evidence=evidence,
    )
