"""The events of one answer as they come in, whoever reads them: the part that sync and async streams share."""

from collections.abc import Iterable
from typing import TypeVar

from appliance.client.results import (
    Accepted,
    Completed,
    Completion,
    Finished,
    Receipt,
    Usage,
    read_accepted,
    read_completed,
    read_finished,
    read_receipt,
)
from appliance.protos import inference_pb2 as api

T = TypeVar("T")
RECEIPT_TRAILER = "cloister-receipt-bin"


class Transcript:
    """What has come of an answer so far.

    `text` and `token_ids` grow while the stream is read. The other attributes raise RuntimeError until the stream
    has brought them; after the last delta all of them are there.
    """

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._accepted: Accepted | None = None
        self._finished: Finished | None = None
        self._completed: Completed | None = None
        self._receipt: Receipt | None = None

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._texts)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All token ids so far; only with `return_token_ids`."""
        return tuple(self._token_ids)

    @property
    def accepted(self) -> Accepted:
        """The first event."""
        return _there(self._accepted, "accepted")

    @property
    def finished(self) -> Finished:
        """Why the generation ended."""
        return _there(self._finished, "finished")

    @property
    def completed(self) -> Completed:
        """The bill and the times."""
        return _there(self._completed, "completed")

    @property
    def usage(self) -> Usage:
        """The bill."""
        return self.completed.usage

    @property
    def receipt(self) -> Receipt:
        """Where the request is in the audit log."""
        return _there(self._receipt, "receipt")

    def _take(self, event: api.GenerateResponse | api.ChatResponse) -> str:
        """Note one event; the text it brought."""
        match event.WhichOneof("event"):
            case "delta":
                self._texts.append(event.delta.text)
                self._token_ids.extend(event.delta.token_ids)
                return event.delta.text
            case "accepted":
                self._accepted = read_accepted(event.accepted)
            case "finished":
                self._finished = read_finished(event.finished)
            case "completed":
                self._completed = read_completed(event.completed)
        return ""

    def _take_trailers(self, trailers: Iterable[tuple[str, str | bytes]]) -> None:
        """Note the receipt."""
        for key, value in trailers:
            if key == RECEIPT_TRAILER and isinstance(value, bytes):
                self._receipt = read_receipt(value)

    def _completion(self) -> Completion:
        return Completion(self.text, self.token_ids, self.accepted, self.finished, self.completed, self.receipt)


def _there(value: T | None, name: str) -> T:
    if value is None:
        raise RuntimeError(f"`{name}` has not come yet; read the stream to its end first")
    return value
