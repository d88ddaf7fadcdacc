"""The streams being answered, by lease, so that control, or its silence, can end them at once."""

import logging
from collections.abc import Iterable, Sequence

import grpc

from appliance.errors import CloisterError
from appliance.gateway.rows import Rows

log = logging.getLogger(__name__)


class Streams:
    """Rows on their way to clients; one that is being settled is no longer here."""

    def __init__(self) -> None:
        self._rows: dict[str, Sequence[Rows]] = {}

    def add(self, lease: str, rows: Sequence[Rows]) -> None:
        """A request's streams begin, one for each of its inputs."""
        self._rows[lease] = rows

    def discard(self, lease: str) -> None:
        """A stream has ended."""
        self._rows.pop(lease, None)

    def cut(self, leases: Iterable[str]) -> None:
        """End the streams of `leases`, which control has closed."""
        for rows in [self._rows.pop(lease) for lease in leases if lease in self._rows]:
            log.warning("stream cut off: control has closed its lease")
            for one in rows:
                one.cut_off(_lease_closed())

    def cut_all(self) -> None:
        """End every stream: control, not hearing from us, has closed their leases or will."""
        self.cut(list(self._rows))


def _lease_closed() -> CloisterError:
    return CloisterError(
        "LEASE_CLOSED",
        "the appliance's control has settled this request as abandoned; send it again under a new id",
        grpc.StatusCode.ABORTED,
    )
