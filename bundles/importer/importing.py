"""One import, from an open source to a committed version or a refusal. Synchronous; runs on a thread of its own.

Order of durability: staged files with a record of each, their links under their digests, new trust, the version's
record, one transaction in store.db (this is the commit), the floors, the end of the staging. A crash before the
transaction leaves the old state, what is staged, and the import as it was recorded last, which the next importer
takes up; after it, the new state, and starting again completes the rest.
"""

import errno
import hashlib
import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from bundles.format import manifest as manifests
from bundles.format.errors import REFUSED, BundleError
from bundles.format.manifest import Manifest
from bundles.format.members import TRUST
from bundles.importer import floors
from bundles.importer.floors import Floors
from bundles.importer.kept import keep, open_kept
from bundles.importer.rate import Rate
from bundles.importer.records import Import, ModelVersion
from bundles.importer.steering import Steering, StoppingError, Volumes
from bundles.importer.workplace import Workplace
from bundles.pipeline import Accepted, Base, Progress, Report, State, Terms, no_base, read_bundle
from bundles.reader import BundleReader
from bundles.store.base import StoredBase
from bundles.store.staging import Staging
from bundles.trust import dsse
from bundles.trust.policy import Head, Verified, check_policy, verify_head, verify_trust
from bundles.trust.roots import Root

MANIFEST, OMS = "manifest.dsse.json", "oms.sig"
_FINAL = (State.COMMITTED, State.REJECTED)
_ORDER = tuple(State)

log = logging.getLogger(__name__)


def import_bundle(
    place: Workplace, import_id: str, path: Path, report: Report, steering: Steering | None = None
) -> Progress:
    """Import one bundle; its final progress, committed or rejected. Every state change is in the outbox.

    Args:
        place: where.
        import_id: a new one.
        path: the bundle, its first volume or its folder.
        report: is told the progress; may raise BundleError to stop the import.
        steering: how it is told to end, and where it gets the volumes that do not lie beside the first.
    """
    place.ledger.begin(import_id, path)
    return _carry_out(_Import(place, import_id, report, steering or Steering()), path)


def take_up(place: Workplace, left: Import, report: Report, steering: Steering | None = None) -> Progress:
    """Go on with an import that an importer left which died or stopped; as `import_bundle`.

    Everything is verified again, and against the trust and the clock of now; no state is recorded a second time.
    Where the bundle's head was kept, the first volume is opened only if one of its chunks is wanted. A volume that
    is not where it was is waited for, the first as well.

    Args:
        place: where.
        left: as it was recorded last.
        report: as in `import_bundle`.
        steering: as in `import_bundle`.
    """
    run = _Import(place, left.import_id, report, steering or Steering(), left)
    return _carry_out(run, Path(left.path))


def _carry_out(run: "_Import", path: Path) -> Progress:
    """To the end of an import, whatever that is; where the importer stops, as far as it came."""
    import_id = run.import_id
    try:
        return run.tell(run.carry_out(path))
    except StoppingError:
        return run.leave()
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

    def __init__(
        self,
        place: Workplace,
        import_id: str,
        report: Report,
        steering: Steering,
        left: Import | None = None,
    ) -> None:
        self.import_id = import_id
        self._place = place
        self._report = report
        self._steering = steering
        self._left: Progress | None = None
        self._offered = ""
        if left is not None:
            staged = place.ledger.staged(left.progress.model_digest)
            self._left, self._offered = replace(left.progress, bytes_done=sum(staged.values())), left.offered
        self._at = Progress(State.QUARANTINE)
        self._recorded = left.progress.state if left else State.QUARANTINE
        self._rate = Rate(place.clock)
        self._staging = Staging(place.store, place.ledger, place.interval)
        self._held = ExitStack()
        self._manifest: Manifest | None = None

    def carry_out(self, path: Path) -> Progress:
        place = self._place
        with place.desk.turn(self._steering), self._held:
            self._steering.check()
            place.ledger.works(self.import_id, True)
            digest = self._left.model_digest if self._left else self._known_as(path)
            head = open_kept(place.store.fs, place.store.staging(digest), digest) if digest else None
            volumes = Volumes(
                path,
                self._steering,
                self._aside,
                self._want,
                partial(place.ledger.offered, self.import_id),
                digest,
                patient=bool(self._left or head),
                offered=self._offered,
            )
            with closing(BundleReader(volumes, head)) as reader:
                if reader.read_header() == TRUST:
                    return self._import_trust(reader)
                return self._import_model(reader, volumes)

    def _known_as(self, path: Path) -> str:
        """The model that the last import which came so far found where nothing lies now; empty where none did."""
        if os.path.lexists(path):
            return ""
        earlier = (held.progress.model_digest for held in self._place.ledger.ended() if held.path == str(path))
        return next(filter(None, earlier), "")

    def leave(self) -> Progress:
        """The importer stops: nothing of this import ends; its progress so far."""
        self._place.ledger.works(self.import_id, False)
        return self._shown

    def reject(self, error: BundleError) -> Progress:
        """Record the refusal, unless the import is committed: then nothing takes that back."""
        if self._at.state is State.COMMITTED:
            return self.tell(self._at)
        rejected = replace(
            self._shown,
            state=State.REJECTED,
            reason=error.code,
            message=error.message,
            volume_wanted=0,
            volume_refused="",
            bytes_per_second=0,
        )
        self._place.ledger.change(self.import_id, rejected)
        return self.tell(rejected)

    def tell(self, ended: Progress) -> Progress:
        """Report the end, once nothing is held any more: whoever hears it may ask for the next thing."""
        self._report(ended)
        return ended

    def _import_model(self, reader: BundleReader, volumes: Volumes) -> Progress:
        place = self._place

        def gate(verified: Verified) -> bool:
            volumes.manifest, volumes.model_digest = verified.manifest, verified.model_digest
            return self._gate(verified)

        root = place.pinned()
        terms = Terms(
            root,
            place.now(),
            gate,
            place.inspector,
            self._base,
            place.revocations(),
            place.revocation_floor(root),
            self._keep_head,
        )
        try:
            with self._forgetting():
                passed = read_bundle(reader, terms, self._staging, self._advance)
            return self._done() if isinstance(passed, Verified) else self._commit(passed)
        finally:
            self._staging.close()
            self._keep_staged()

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """Files that are what they should be and are not wanted here, nobody will want from staging."""
        try:
            yield
        except BundleError as error:
            judged = self._at.state is State.CONTENT and not error.code.startswith("INSPECT_")
            if judged and error.exit_status == REFUSED:
                with suppress(OSError):
                    self._staging.close()
                    self._place.discard_staging(self._at.model_digest)
            raise

    def _advance(self, progress: Progress) -> None:
        if progress.state not in _FINAL:
            self._steering.check()
        if _ORDER.index(progress.state) > _ORDER.index(self._recorded):
            self._place.ledger.change(self.import_id, progress)
            self._recorded = progress.state
        self._at = replace(progress, bytes_per_second=self._rate(progress.bytes_hashed))
        self._report(self._shown)

    @property
    def _shown(self) -> Progress:
        """Where it is; one that was taken up does not go back while all is verified again."""
        at = self._at
        if self._left is not None and at.state is State.QUARANTINE:
            at = replace(
                self._left,
                volumes=max(at.volumes, self._left.volumes),
                volume_wanted=at.volume_wanted,
                volume_refused=at.volume_refused,
            )
        return replace(at, state=max(at.state, self._recorded, key=_ORDER.index))

    def _want(self, index: int, refused: str) -> None:
        """Tell that a volume is waited for."""
        self._rate.pause()
        volumes = max(self._at.volumes, 1)
        self._at = replace(
            self._at, volumes=volumes, volume_wanted=index, volume_refused=refused, bytes_per_second=0
        )
        self._report(self._shown)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Let other imports work while this one waits for a person; what it has is recorded first."""
        self._staging.record()
        self._promise()
        self._place.ledger.works(self.import_id, False)
        with self._place.desk.aside(self._steering):
            yield
        self._place.ledger.works(self.import_id, True)
        self._rate.pause()
        self._advance(replace(self._at, volume_wanted=0, volume_refused=""))

    def _gate(self, verified: Verified) -> bool:
        """False when this very bundle is committed and whole; a damaged store is filled again from it."""
        place, digest = self._place, verified.model_digest
        self._held.enter_context(place.desk.claim(digest))
        self._check_root(verified.root)
        known = place.ledger.find(digest)
        if known is None:
            self._judge(verified)
        elif self._whole(known):
            return False
        self._staging.open(digest)
        self._manifest = verified.manifest
        place.store.check_space(self._staging.needed(verified.manifest), place.desk.promised(digest))
        self._promise()
        return True

    def _promise(self) -> None:
        """Tell the other imports how much space this one will still take."""
        if self._manifest is not None:
            self._place.desk.promise(self._at.model_digest, self._staging.needed(self._manifest))

    def _judge(self, verified: Verified) -> None:
        """Hold a new version to policy."""
        manifest, ledger = verified.manifest, self._place.ledger
        check_policy(verified, self._place.site(self._place.now(), verified.revocations))
        if ledger.find(manifest.reference) is not None:
            raise BundleError(
                "VERSION_REUSED", f"another {manifest.reference} was imported; give this one a new name"
            )
        held = ledger.reference_at(manifest.name, manifest.sequence)
        if held:  # a revoked one: the floor that it set holds no longer
            raise BundleError(
                "SEQUENCE_REUSED",
                f"{held} in the store has sequence {manifest.sequence}, too; remove it (cloister bundle remove), "
                "or release this one with a higher sequence",
            )

    def _check_root(self, root: Root) -> None:
        """Refuse a trust root that is older than what was in force here: a restored backup."""
        held = self._place.floors().root
        if root.version < held:
            raise BundleError(
                "ROOT_ROLLBACK",
                f"trust root {held} was in force, {root.version} is the newest here; install the newer one",
            )

    def _whole(self, version: ModelVersion) -> bool:
        """Whether the store has every byte of a version; reading them shows as progress and can be interrupted."""
        at = self._at

        def read(count: int) -> None:
            done = min(at.bytes_total, self._at.bytes_done + count)
            hashed = self._at.bytes_hashed + count
            self._advance(replace(at, bytes_done=done, bytes_hashed=hashed, file="(in the store)"))

        if not self._place.store.whole([*version.digests()], read):
            self._at = at
            return False
        for digest in version.digests():
            self._place.ledger.repaired(digest, self.import_id)
        return True

    def _base(self, manifest: Manifest) -> Base:
        """The version that a delta builds on, as the store keeps it."""
        place = self._place
        version = place.ledger.find(manifest.base or "")
        if version is None or version.model_digest != manifest.base:
            return no_base(manifest)
        try:
            envelope = place.store.path_of(version.evidence[MANIFEST]).read_bytes()
            payload = dsse.parse(envelope, "the base's manifest").payload
            if hashlib.sha256(payload).hexdigest() == manifest.base:
                base = StoredBase(manifests.parse(payload), place.store.path_of)
                return self._held.enter_context(closing(base))
        except (OSError, BundleError):
            pass
        raise BundleError(
            "BASE_DAMAGED",
            f"the store lost the manifest of {version.reference}; import its bundle again, then this",
        )

    def _commit(self, accepted: Accepted) -> Progress:
        place, verified = self._place, self._verify_again(accepted.head)
        known = place.ledger.find(verified.model_digest)
        if known is None:
            with self._forgetting():
                self._judge(verified)
        evidence = self._keep_evidence(accepted)
        imported_at = known.imported_at if known else int(place.now().timestamp())
        version = ModelVersion.of(verified, imported_at, evidence)
        committed = replace(self._at, state=State.COMMITTED, file="", bytes_per_second=0)
        with place.desk.publishing:
            try:
                self._staging.publish({damage.sha256 for damage in place.ledger.damaged()})
                place.keep_trust(verified.new_roots, verified.revocations)
                place.store.write_record(version.name, version.sequence, version.as_dict())
            except (OSError, BundleError):
                self._withdraw(version)
                raise
            place.ledger.commit(self.import_id, committed, version, place.trust_in_force(), verified.revocations)
        self._at = committed
        self._close_books(floors.of_trust(verified.root, verified.revocations))
        return committed

    def _verify_again(self, head: Head) -> Verified:
        """Under the trust and the clock of now: while this import waited for a medium, others may have ended.

        What they brought must not be lost to what this bundle was verified with, and may revoke it.
        """
        place = self._place
        root = place.pinned()
        floor = place.revocation_floor(root)
        verified = verify_head(head, root, place.now(), place.revocations(), revocation_floor=floor)
        self._check_root(verified.root)
        return verified

    def _withdraw(self, version: ModelVersion) -> None:
        """Take back what was published of a version that there will not be; it is staged still."""
        place = self._place
        with suppress(OSError):
            if place.ledger.find(version.model_digest) is None:
                place.store.remove_record(version.name, version.sequence)
            place.store.remove(frozenset(version.digests()) - place.ledger.listed())

    def _close_books(self, raised: Floors) -> None:
        """What follows a commit: the floors of trust, and with them those in the database, go into their file.

        Where it fails, the next start does it.
        """
        try:
            self._place.raise_floors(raised)
            self._staging.discard()
        except (OSError, BundleError) as error:
            log.error("an import is not tidied up", extra={"import_id": self.import_id, "error": str(error)})

    def _done(self) -> Progress:
        """Nothing was to do: the same bundle is in the store. The payload offered now was not read."""
        committed = replace(self._at, state=State.COMMITTED, bytes_done=0, file="", bytes_per_second=0)
        self._place.ledger.change(self.import_id, committed)
        self._at = committed
        with suppress(OSError):
            self._place.discard_staging(committed.model_digest)
        return committed

    def _keep_head(self, head: Head, documents: Mapping[str, bytes]) -> None:
        """Who takes this import up shall not need the first volume for it."""
        place = self._place
        keep(place.store.fs, place.store.staging(self._at.model_digest), head, documents)

    def _keep_evidence(self, accepted: Accepted) -> dict[str, str]:
        """The signed documents themselves, byte for byte, for whoever verifies again."""
        evidence = {document.member: document.sha256 for document in accepted.verified.manifest.documents}
        for name, content in ((MANIFEST, accepted.head.envelope), (OMS, accepted.head.oms or b"")):
            evidence[name] = hashlib.sha256(content).hexdigest()
            self._staging.keep(evidence[name], content)
        return evidence

    def _keep_staged(self) -> None:
        """Record what the next import of this bundle need not read; where that is nothing, leave nothing."""
        digest = self._at.model_digest
        if self._at.state is State.COMMITTED or not digest:
            return
        with suppress(OSError):
            self._staging.trim()
            self._staging.record()
            if not (self._place.ledger.staged(digest) or self._steering.stopping):
                self._staging.discard()

    def _import_trust(self, reader: BundleReader) -> Progress:
        """A few kilobytes: roots and revocations, each proved, none older than what is in force."""
        place = self._place
        self._report(self._shown)
        head = reader.read_trust()
        pinned = place.pinned()
        trust = verify_trust(
            head.roots,
            head.revocation,
            pinned,
            place.now(),
            place.revocations(),
            revocation_floor=place.revocation_floor(pinned),
        )
        sequence = trust.revocations.sequence if trust.revocations else 0
        at = Progress(State.SIGNED, kind=TRUST, model_version=f"{TRUST}@{sequence}", volumes=1)
        self._advance(at)
        self._check_root(trust.root)
        self._advance(replace(at, state=State.POLICY))
        place.keep_trust(trust.new_roots, trust.revocations)
        committed = replace(at, state=State.COMMITTED)
        place.ledger.commit_trust(self.import_id, committed, place.trust_in_force())
        self._at = committed
        self._close_books(floors.of_trust(trust.root, trust.revocations))
        return committed
