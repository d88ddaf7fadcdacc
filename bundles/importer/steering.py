"""How an import that runs is told from outside: it is to end, or here is the next volume."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bundles.format.errors import BundleError
from bundles.format.manifest import Manifest
from bundles.format.source import Source, open_source, sibling
from bundles.importer.kept import open_first
from bundles.reader import open_volume

_LOOK_S = 0.2


class StoppingError(BundleError):
    """The importer stops; the import is left as it is, and the next importer goes on with it."""

    def __init__(self) -> None:
        super().__init__("STOPPING", "the importer is stopping; the import goes on by itself once it is back")


class Wanted(NamedTuple):
    """A volume that an import waits for.

    Attributes:
        number: of the volume.
        open: what is at a path, if it is that volume; else it raises BundleError.
        place: where it would lie by itself; BundleError VOLUME_MISSING where nothing is there.
    """

    number: int
    open: Callable[[Path], Source]
    place: Callable[[], Path]


class Steering:
    """What the outside wants of one import; safe to call from several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._end: BundleError | None = None
        self._wanted: Wanted | None = None
        self._offered: tuple[Source, Path] | None = None
        self._opening = False
        self._refused = ""

    def end(self, reason: BundleError) -> None:
        """The import is to end at its next chunk, or at once where it waits; the first reason holds."""
        with self._changed:
            self._end = self._end or reason
            self._changed.notify_all()

    @property
    def stopping(self) -> bool:
        """It ends because the importer does."""
        return isinstance(self._end, StoppingError)

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
            wanted, self._opening = self._wanted, True
        source: Source | None = None
        refused = ""
        try:
            source = wanted.open(path)  # not under the lock: a medium may hang
        except BundleError as error:
            refused = f"{error.code}: {error.message}"
            raise
        finally:
            with self._changed:
                self._opening, self._refused = False, refused
                if source is not None and self._wanted is not None:
                    self._offered = source, path
                    source = None
                self._changed.notify_all()
            if source is not None:
                source.close()  # the import ended meanwhile

    def look_again(self) -> int:
        """Look once more where the wanted volume lies by itself; its number if it is there now, else 0."""
        with self._changed:
            wanted = self._wanted
        try:
            if wanted is not None:
                self.offer(wanted.place())
                return wanted.number
        except BundleError:
            pass  # the import tells what is wrong with it
        return 0

    def wait_for_volume(self, wanted: Wanted, tell: Callable[[str], None], refused: str) -> tuple[Source, Path]:
        """The volume, once it is offered, and where it was.

        Args:
            wanted: the volume.
            tell: is told why the last offer was not taken, empty at first; at the start and at every refusal.
            refused: why what lies where it should is not it.

        Raises:
            BundleError: the import is to end.
        """
        with self._changed:
            self._wanted, self._refused = wanted, refused
            told: str | None = None
            try:
                while self._offered is None:
                    self.check()
                    if told != self._refused:
                        told = self._refused
                        tell(told)
                        continue
                    self._changed.wait()
                taken, self._offered = self._offered, None
                return taken
            finally:
                self._wanted = None


class Desk:
    """One import works at a time, in the order in which they came; others wait. Safe to call from several threads.

    Each is known by its steering.

    Attributes:
        publishing: held while files become a version's, and while those of no version are deleted.
    """

    def __init__(self) -> None:
        self.publishing = threading.Lock()
        self._changed = threading.Condition()
        self._queue: deque[Steering] = deque()
        self._claims: dict[str, int] = {}

    def line_up(self, steering: Steering) -> None:
        """Take a place behind those that are here; nothing where it has one. Who does so must `leave`."""
        with self._changed:
            if steering not in self._queue:
                self._queue.append(steering)

    def leave(self, steering: Steering) -> None:
        """Give a place up; nothing where there is none."""
        with self._changed:
            if steering in self._queue:
                self._queue.remove(steering)
            self._changed.notify_all()

    @contextmanager
    def turn(self, steering: Steering) -> Iterator[None]:
        """Hold the desk for the block.

        Raises:
            BundleError: the import is to end, before its turn came.
        """
        try:
            self._take(steering)
            yield
        finally:
            self.leave(steering)

    @contextmanager
    def aside(self, steering: Steering) -> Iterator[None]:
        """Let others work during the block, which waits for a person; hold the desk again unless it raised."""
        self.leave(steering)
        yield
        self._take(steering)

    @contextmanager
    def claim(self, model_digest: str) -> Iterator[None]:
        """Be the one import of this model for the block.

        Raises:
            BundleError: IMPORT_RUNNING.
        """
        with self._changed:
            if model_digest in self._claims:
                raise BundleError(
                    "IMPORT_RUNNING",
                    "another import of the same bundle runs or waits (cloister bundle imports); hand it what it "
                    "waits for by naming its path, with --volume where that is elsewhere now, or cancel it",
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

    def _take(self, steering: Steering) -> None:
        self.line_up(steering)
        with self._changed:
            while self._queue[0] is not steering:
                steering.check()
                self._changed.wait(_LOOK_S)


class Volumes:
    """Hands a reader the volumes of a bundle: those beside the first, else as they are offered.

    Args:
        first: where volume 1 is.
        steering: hears offers.
        aside: lets other imports work while this one waits.
        tell: is told the volume wanted and why the last one was refused.
        took: is told where a volume was that was offered.
        model_digest: of the bundle's manifest, where an import is taken up again that had verified it.
        patient: volume 1 is waited for like the others.
        offered: where the last one was that was offered before the import was taken up.

    Attributes:
        manifest: of the bundle, once it is verified.
        model_digest: of that.
    """

    def __init__(
        self,
        first: Path,
        steering: Steering,
        aside: Callable[[], AbstractContextManager[None]],
        tell: Callable[[int, str], None],
        took: Callable[[Path], None],
        model_digest: str = "",
        *,
        patient: bool = False,
        offered: str = "",
    ) -> None:
        self._first, self._steering, self._aside, self._tell, self._took = first, steering, aside, tell, took
        self._patient, self._offered = patient, offered
        self.manifest: Manifest | None = None
        self.model_digest = model_digest

    def __call__(self, index: int) -> Source:
        """See `reader.BundleReader`."""
        if not (self._patient or self.manifest):
            return open_source(self._first)
        wanted = Wanted(index, lambda path: self._open(path, index), lambda: self._place(index))
        if self._offered:
            with suppress(BundleError):
                return wanted.open(Path(self._offered))
        refused = ""
        try:
            return wanted.open(wanted.place())
        except BundleError as error:
            if error.code != "VOLUME_MISSING":
                refused = f"{error.code}: {error.message}"
        with ExitStack() as unless_taken:
            with self._aside():
                source, path = self._steering.wait_for_volume(wanted, partial(self._tell, index), refused)
                unless_taken.callback(source.close)
            self._took(path)
            unless_taken.pop_all()
            return source

    def _open(self, path: Path, index: int) -> Source:
        """What is at `path`, if it is this volume."""
        if self.manifest is not None and index > 1:
            return open_volume(path, self.manifest, index)
        return open_first(path, self.model_digest)

    def _place(self, index: int) -> Path:
        """Where a volume lies by itself.

        Raises:
            BundleError: VOLUME_MISSING.
        """
        if index > 1:
            return sibling(self._first, index)
        if not os.path.lexists(self._first):
            raise BundleError("VOLUME_MISSING", f"volume 1 is wanted and {self._first} does not exist")
        return self._first
