"""Where imports happen: store, ledger, trust and what this site allows; at start it clears what a crash left."""

import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from bundles.content.inspector import Inspector
from bundles.durable import DISK, Fs, is_temporary
from bundles.format.errors import BundleError
from bundles.importer import floors
from bundles.importer.floors import Floors
from bundles.importer.ledger import MOST_DEATHS, Ledger
from bundles.importer.records import ModelVersion
from bundles.importer.steering import Desk
from bundles.pipeline import State
from bundles.store.files import Store
from bundles.store.staging import SYNC_INTERVAL
from bundles.trust import revocation, roots
from bundles.trust.policy import Site, clock_floor
from bundles.trust.revocation import Revocations
from bundles.trust.roots import Root

STAGING_KEPT_S = 30 * 24 * 3600
FLOORS = "floors.json"
REVOCATION = "revocation.json"

log = logging.getLogger(__name__)


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Allowed:
    """What this site allows.

    Attributes:
        licences: SPDX identifiers; None for any.
        quota: most bytes the store may hold; 0 for no such limit.
    """

    licences: frozenset[str] | None = None
    quota: int = 0


@dataclass(frozen=True)
class Workplace:
    """Where imports happen.

    Attributes:
        trust: folder of trust roots, revocations and floors.
        store: the model store.
        ledger: store.db.
        inspector: runs engine-inspect.
        now: the clock.
        appliance: this appliance's name, for bundles that name their targets.
        licences: SPDX identifiers that may be imported; None for any.
        clock: seconds, never going back, for rates.
        interval: bytes between records of what is staged.
        desk: who may work.
    """

    trust: Path
    store: Store
    ledger: Ledger
    inspector: Inspector
    now: Callable[[], datetime] = _now
    appliance: str = ""
    licences: frozenset[str] | None = None
    clock: Callable[[], float] = time.monotonic
    interval: int = SYNC_INTERVAL
    desk: Desk = field(default_factory=Desk)

    @classmethod
    def open(
        cls,
        home: Path,
        inspector: Inspector | None = None,
        *,
        fs: Fs = DISK,
        allowed: Allowed = Allowed(),
        interval: int = SYNC_INTERVAL,
    ) -> "Workplace":
        """The workplace in a home directory, cleared of what a dead process left.

        `trust/site`, which init writes, has the appliance's name.

        Raises:
            BundleError: FLOORS_DAMAGED, LEDGER_NEWER.
        """
        store = Store(home / "store", fs, allowed.quota)
        fs.make_folder(home / "trust")
        place = cls(
            home / "trust",
            store,
            Ledger(home / "store" / "store.db", fs=fs),
            inspector or Inspector(),
            appliance=_site_name(home / "trust" / "site"),
            licences=allowed.licences,
            interval=interval,
        )
        place._settle()
        return place

    def pinned(self) -> Root:
        """The newest trust root that is installed.

        Raises:
            BundleError: the ROOT codes.
        """
        return roots.load_pinned(self.trust)

    def revocations(self) -> Revocations | None:
        """The revocations that are installed.

        Raises:
            BundleError: REVOCATION_SCHEMA and the like: nothing is imported on a guess.
        """
        try:
            return revocation.parse((self.trust / REVOCATION).read_bytes())
        except FileNotFoundError:
            return None

    def revocation_floor(self, root: Root) -> int:
        """The lowest sequence that revocations may have while the keys of `root` vouch for them."""
        held = self.floors()
        return held.revocation if held.revocation_role == floors.role_digest(root) else 0

    def keep_trust(self, new_roots: tuple[Root, ...], revocations: Revocations | None) -> None:
        """Install what a bundle brought and proved, durably."""
        for root in new_roots:
            self.store.fs.write_file(self.trust / f"{root.version}.root.json", root.raw)
        path = self.trust / REVOCATION
        if revocations is not None and not (path.exists() and path.read_bytes() == revocations.raw):
            self.store.fs.write_file(path, revocations.raw)

    def trust_in_force(self) -> tuple[int, int]:
        """Version of the trust root and sequence of the revocations that are installed; 0 for none of these."""
        root, held = self.pinned(), self.revocations()
        return root.version, held.sequence if held else 0

    def floors(self) -> Floors:
        """The higher of the floors in the file and in the database."""
        held = floors.load(self.trust / FLOORS).join(self.ledger.floors(), self.revocations())
        return held.join(Floors(root=self.ledger.trust()[0]))

    def raise_floors(self, raised: Floors) -> None:
        """Write floors that are nowhere lower than those held."""
        floors.save(self.trust / FLOORS, self.floors().join(raised), self.store.fs)

    def site(self, now: datetime, revocations: Revocations | None) -> Site:
        """What a manifest is judged against."""
        held = self.floors()
        return Site(
            now,
            clock_floor(held.clock, revocations),
            tuple(held.models.items()),
            self.appliance,
            self.ledger.names(),
            self.licences,
        )

    def discard_staging(self, model_digest: str) -> int:
        """Forget what is staged of a model; the bytes that are free then."""
        freed = self.store.staged_bytes(model_digest)
        self.ledger.unstage(model_digest)
        self.store.fs.remove_tree(self.store.root / "staging" / model_digest)
        return freed

    def discard_expired(self) -> None:
        """Throw away staging that nobody came back for in 30 days; not that of an import which waits so long."""
        oldest = time.time_ns() - STAGING_KEPT_S * 10**9
        awaited = self._unfinished()
        for model_digest, changed_ns in self.ledger.stagings().items():
            if changed_ns < oldest and model_digest not in awaited:
                with suppress(BundleError), self.desk.claim(model_digest):  # IMPORT_RUNNING
                    self.discard_staging(model_digest)

    def sweep(self) -> None:
        """Remove what nothing lists and staging that nobody came back for."""
        for path in self.trust.iterdir():
            if is_temporary(path):
                self.store.fs.unlink(path)
        staged = frozenset(self.ledger.stagings())
        awaited = staged | self._unfinished()
        for model_digest in awaited:
            self.store.trim(model_digest, self.ledger.staged(model_digest))
        kept = [*self.ledger.versions(), *self._lost(staged)]
        listed = frozenset(digest for version in kept for digest in version.digests())
        self.store.sweep(listed, [(version.name, version.sequence) for version in kept], awaited)
        self.discard_expired()

    def _unfinished(self) -> frozenset[str]:
        """Digests of the models whose imports are under way, as far as these are known."""
        return frozenset(left.progress.model_digest for left in self.ledger.unfinished()) - {""}

    def _lost(self, staged: Collection[str]) -> Iterator[ModelVersion]:
        """Versions whose records are here and that store.db does not know: it was lost, or an older one restored.

        Their files stay, and importing their bundles again finds them. The record of an import that died before
        its commit is none of those: what it published is still staged.
        """
        known = {version.model_digest for version in self.ledger.versions()}
        for record in self.store.records():
            try:
                version = ModelVersion.from_json(record.read_text())
            except (ValueError, KeyError, TypeError, OSError):
                continue
            if version.model_digest not in known and version.model_digest not in staged:
                log.error(
                    "store.db does not know a version that the store has; import its bundle again",
                    extra={"model_version": version.reference},
                )
                yield version

    def _settle(self) -> None:
        """Close what a process that died left open; room first, where the disk is full.

        Its imports are taken up by whoever serves this workplace, but for those that it died of again and again.
        """
        self.sweep()
        deadly = self.ledger.bury()
        for left in self.ledger.unfinished():
            if left.import_id in deadly:
                stopped = replace(
                    left.progress,
                    state=State.REJECTED,
                    reason="INTERRUPTED",
                    message=f"the importer died {MOST_DEATHS} times while it was at this import; look at its log, "
                    "then import the bundle again: it goes on where it was",
                )
                self.ledger.change(left.import_id, stopped)
        for version in self.ledger.versions():
            if not self.store.record_path(version.name, version.sequence).exists():
                self.store.write_record(version.name, version.sequence, version.as_dict())
        raised = Floors()
        with suppress(BundleError):  # without a root there is nothing in force yet
            self.ledger.trusts(self.trust_in_force())
            raised = floors.of_trust(self.pinned(), self.revocations())
        self.raise_floors(raised)


def _site_name(path: Path) -> str:
    """The name in the file; empty when there is none."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""
