"""The events of one request as they come in, whoever reads them: the part that sync and async streams share."""

from collections.abc import Iterable
from typing import TypeVar

from appliance.client.results import (
    Accepted,
    Choice,
    Completed,
    Completion,
    Delta,
    Finished,
    Receipt,
    TokenLogprob,
    Usage,
    read_accepted,
    read_completed,
    read_delta,
    read_finished,
    read_receipt,
)
from appliance.protos import inference_pb2 as api

T = TypeVar("T")
RECEIPT_TRAILER = "cloister-receipt-bin"


class Answer:
    """One of the n answers to a request, as far as it has come."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._finished: Finished | None = None

    @property
    def index(self) -> int:
        """Which of the n answers."""
        return self._index

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._texts)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All token ids so far; only with `return_token_ids`."""
        return tuple(self._token_ids)

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """One for each token so far; only with `logprobs`."""
        return tuple(self._logprobs)

    @property
    def is_finished(self) -> bool:
        """Nothing more will come."""
        return self._finished is not None

    @property
    def finished(self) -> Finished:
        """Why it ended."""
        return _there(self._finished, "finished")

    def _add(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        self._token_ids.extend(delta.token_ids)
        self._logprobs.extend(delta.logprobs)

    def _choice(self) -> Choice:
        return Choice(self._index, self.text, self.token_ids, self.logprobs, self.finished)


class Transcript:
    """What has come of a request so far.

    `answers` and what they hold grow while the stream is read. The other attributes raise RuntimeError until the
    stream has brought them; after the last delta all of them are there. `text`, `token_ids`, `logprobs` and
    `finished` are those of the first answer, which is the only one unless `n` was given.

    Attributes:
        answers: the n answers, by index.
    """

    def __init__(self, answers: int) -> None:
        self.answers = tuple(map(Answer, range(answers)))
        self._prompt_logprobs: list[TokenLogprob] = []
        self._accepted: Accepted | None = None
        self._completed: Completed | None = None
        self._receipt: Receipt | None = None

    @property
    def text(self) -> str:
        """All text of the first answer so far."""
        return self.answers[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All token ids of the first answer so far; only with `return_token_ids`."""
        return self.answers[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """One for each token of the first answer so far; only with `logprobs`."""
        return self.answers[0].logprobs

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob, ...]:
        """One for each token of the prompt from the second on; only with `prompt_logprobs`."""
        return tuple(self._prompt_logprobs)

    @property
    def accepted(self) -> Accepted:
        """The first event."""
        return _there(self._accepted, "accepted")

    @property
    def finished(self) -> Finished:
        """Why the first answer ended."""
        return self.answers[0].finished

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

    def _take(self, event: api.GenerateResponse | api.ChatResponse) -> Delta | None:
        """Note one event; the delta, if it is one."""
        match event.WhichOneof("event"):
            case "delta":
                delta = read_delta(event.delta)
                self.answers[delta.index]._add(delta)
                self._prompt_logprobs.extend(delta.prompt_logprobs)
                return delta
            case "accepted":
                self._accepted = read_accepted(event.accepted)
            case "finished":
                self.answers[event.finished.index]._finished = read_finished(event.finished)
            case "completed":
                self._completed = read_completed(event.completed)
        return None

    def _take_trailers(self, trailers: Iterable[tuple[str, str | bytes]]) -> None:
        """Note the receipt."""
        for key, value in trailers:
            if key == RECEIPT_TRAILER and isinstance(value, bytes):
                self._receipt = read_receipt(value)

    def _check_single(self) -> None:
        """Refuse to give the text of several answers as if it were one.

        Raises:
            ValueError: there is more than one answer.
        """
        if len(self.answers) > 1:
            raise ValueError("there are several answers (n > 1): iterate over `deltas()`, each has its `index`")

    def _completion(self) -> Completion:
        choices = tuple(answer._choice() for answer in self.answers)
        return Completion(choices, self.prompt_logprobs, self.accepted, self.completed, self.receipt)


def _there(value: T | None, name: str) -> T:
    if value is None:
        raise RuntimeError(f"`{name}` has not come yet; read the stream to its end first")
    return value
