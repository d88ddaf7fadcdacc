"""How an import that runs is told from outside: it is to end, or here is the next volume."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from bundles.format.errors import BundleError
from bundles.format.manifest import Manifest
from bundles.format.source import Source, open_source, sibling
from bundles.reader import open_volume

_LOOK_S = 0.2


class Steering:
    """What the outside wants of one import; safe to call from several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._end: BundleError | None = None
        self._wanted: tuple[int, Manifest] | None = None
        self._offered: Source | None = None
        self._opening = False
        self._refused = ""

    def end(self, reason: BundleError) -> None:
        """The import is to end at its next chunk, or at once where it waits; the first reason holds."""
        with self._changed:
            self._end = self._end or reason
            self._changed.notify_all()

    def check(self) -> None:
        """Called by the import.

        Raises:
            BundleError: it is to end.
        """
        if self._end is not None:
            raise self._end

    def offer(self, path: Path) -> None:
        """Hand over the volume that is wanted.

        Raises:
            BundleError: VOLUME_NOT_WANTED, VOLUME_ORDER, VOLUME_MIXED, the SOURCE and CONTAINER codes; the import
                waits on.
        """
        with self._changed:
            if self._wanted is None or self._offered is not None or self._opening:
                raise BundleError("VOLUME_NOT_WANTED", "the import waits for no volume now")
            (index, manifest), self._opening = self._wanted, True
        source: Source | None = None
        refused = ""
        try:
            source = open_volume(path, manifest, index)  # not under the lock: a medium may hang
        except BundleError as error:
            refused = f"{error.code}: {error.message}"
            raise
        finally:
            with self._changed:
                self._opening, self._refused = False, refused
                if self._wanted is not None:
                    source, self._offered = None, source
                self._changed.notify_all()
            if source is not None:
                source.close()  # the import ended meanwhile

    def wait_for_volume(self, index: int, manifest: Manifest, tell: Callable[[str], None], refused: str) -> Source:
        """The volume, once it is offered.

        Args:
            index: of the volume.
            manifest: of the bundle.
            tell: is told why the last offer was not taken, empty at first; at the start and at every refusal.
            refused: why what lies beside the first volume is not it.

        Raises:
            BundleError: the import is to end.
        """
        with self._changed:
            self._wanted, self._refused = (index, manifest), refused
            told: str | None = None
            try:
                while self._offered is None:
                    self.check()
                    if told != self._refused:
                        told = self._refused
                        tell(told)
                        continue
                    self._changed.wait()
                source, self._offered = self._offered, None
                return source
            finally:
                self._wanted = None


class Desk:
    """One import works at a time, in the order in which they came; others wait. Safe to call from several threads.

    Attributes:
        publishing: held while files become a version's, and while those of no version are deleted.
    """

    def __init__(self) -> None:
        self.publishing = threading.Lock()
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._claims: dict[str, int] = {}

    @contextmanager
    def turn(self, check: Callable[[], None]) -> Iterator[object]:
        """Hold the desk for the block; the ticket for it. `check` may raise while waiting."""
        ticket = object()
        try:
            self._take(ticket, check)
            yield ticket
        finally:
            self._leave(ticket)

    @contextmanager
    def aside(self, ticket: object, check: Callable[[], None]) -> Iterator[None]:
        """Let others work during the block, which waits for a person; hold the desk again unless it raised."""
        self._leave(ticket)
        yield
        self._take(ticket, check)

    @contextmanager
    def claim(self, model_digest: str) -> Iterator[None]:
        """Be the one import of this model for the block.

        Raises:
            BundleError: IMPORT_RUNNING.
        """
        with self._changed:
            if model_digest in self._claims:
                raise BundleError(
                    "IMPORT_RUNNING", "another import of the same bundle runs or waits; see it, or cancel it first"
                )
            self._claims[model_digest] = 0
        try:
            yield
        finally:
            with self._changed:
                del self._claims[model_digest]

    def promise(self, model_digest: str, needed: int) -> None:
        """So many bytes will be written under a claim."""
        with self._changed:
            self._claims[model_digest] = needed

    def promised(self, model_digest: str) -> int:
        """Bytes that all other claims will write."""
        with self._changed:
            return sum(needed for digest, needed in self._claims.items() if digest != model_digest)

    def _take(self, ticket: object, check: Callable[[], None]) -> None:
        with self._changed:
            self._queue.append(ticket)
            while self._queue[0] is not ticket:
                check()
                self._changed.wait(_LOOK_S)

    def _leave(self, ticket: object) -> None:
        with self._changed:
            if ticket in self._queue:
                self._queue.remove(ticket)
            self._changed.notify_all()


class Volumes:
    """Hands a reader the volumes of a bundle: those beside the first, else as they are offered.

    Args:
        first: where volume 1 is.
        steering: hears offers.
        aside: lets other imports work while this one waits.
        tell: is told the volume wanted and why the last one was refused.
    """

    def __init__(
        self,
        first: Path,
        steering: Steering,
        aside: Callable[[], AbstractContextManager[None]],
        tell: Callable[[int, str], None],
    ) -> None:
        self._first, self._steering, self._aside, self._tell = first, steering, aside, tell
        self.manifest: Manifest | None = None
        """Of the bundle, once it is verified."""

    def __call__(self, index: int) -> Source:
        """See `reader.BundleReader`."""
        if index == 1 or self.manifest is None:
            return open_source(self._first)
        refused = ""
        try:
            return self._beside(index, self.manifest)
        except BundleError as error:
            if error.code != "VOLUME_MISSING":
                refused = f"{error.code}: {error.message}"
        with ExitStack() as unless_taken:
            with self._aside():
                source = self._steering.wait_for_volume(
                    index, self.manifest, lambda reason: self._tell(index, reason), refused
                )
                unless_taken.callback(source.close)
            unless_taken.pop_all()
            return source

    def _beside(self, index: int, manifest: Manifest) -> Source:
        """The volume that lies beside the first.

        Raises:
            BundleError: VOLUME_MISSING; what is there is another.
        """
        return open_volume(sibling(self._first, index), manifest, index)
