"""A model's tokenizer in which no text from outside can spell a control token.

A control token is an added token marked `special`. Here each is renamed to an alias of 128 random bits, in the
added tokens and in the vocabulary. What a chat template writes gets its control tokens replaced by their
aliases; text from outside stays as it is and finds nothing to match. Everything is encoded in one call over one
string, so the ids of ordinary text are those of the tokenizer as published.

Source: the `tokenizer.json` format of Hugging Face `tokenizers`.
"""

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tokenizers import Encoding, Tokenizer

from engine.errors import EngineError
from engine.strict_json import load_object


class Encoded(NamedTuple):
    """Tokens of a text, or of two.

    Attributes:
        ids: in order.
        segments: of each token, 0 or 1.
        cut: an end was left out.
    """

    ids: list[int]
    segments: list[int]
    cut: bool = False


class ControlTokenizer:
    """A tokenizer whose control tokens have secret names.

    Args:
        document: the bytes of a `tokenizer.json`.

    Attributes:
        controls: the control tokens' text and ids.
        size: one more than the highest token id.
        longest_token: characters of the longest ordinary token; none stands for more characters of text.

    Raises:
        EngineError: TOKENIZER_INVALID, the document is not one.
    """

    def __init__(self, document: bytes) -> None:
        tokenizer = load_object(document, "tokenizer.json", "TOKENIZER_INVALID")
        try:
            added = [token for token in tokenizer["added_tokens"] if token["content"]]
            self.controls = {token["content"]: int(token["id"]) for token in added if token["special"]}
            nonce = secrets.token_hex(16)
            self._alias = {text: f"{nonce}{index:06x}" for index, text in enumerate(self.controls)}
            spelled = [token["content"] for token in added]
            _rename(tokenizer, self._alias)
            self._tokenizer = Tokenizer.from_str(json.dumps(tokenizer))
        except EngineError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise EngineError(
                "TOKENIZER_INVALID", "tokenizer.json is not a tokenizer that can be loaded"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        aliases = set(self._alias.values())
        self.size = max(vocabulary.values(), default=-1) + 1
        self.longest_token = max((len(text) for text in vocabulary.keys() - aliases), default=1)
        self._added = _longest_first(spelled)

    def has(self, token_id: int) -> bool:
        """Whether the vocabulary has this id."""
        return self._tokenizer.id_to_token(token_id) is not None

    def mark_controls(self, text: str) -> str:
        """`text` with every control token spelled in it replaced by its alias; for text of templates only."""
        if self._added is None:
            return text
        return self._added.sub(lambda match: self._alias.get(match[0], match[0]), text)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of `text`: aliases become control tokens, all else ordinary tokens.

        `add_special_tokens` adds what the tokenizer's post-processor adds, a begin token as a rule.
        """
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_within(self, text: str, second: str | None, most: int) -> Encoded:
        """At most `most` tokens of a text, or of two joined as the model reads pairs, special tokens included.

        What is too long is cut at its end, of two texts the longer one first; special tokens stay.

        Raises:
            EngineError: CONTEXT_OVERFLOW, the special tokens alone are too many.
        """
        try:
            self._tokenizer.enable_truncation(most, strategy="longest_first", direction="right")
            encoding = self._encode(text, second)
        except Exception as error:  # tokenizers raises bare Exception
            raise EngineError("CONTEXT_OVERFLOW", f"{most} tokens leave no room for text") from error
        finally:
            self._tokenizer.no_truncation()
        return Encoded(list(encoding.ids), list(encoding.type_ids), bool(encoding.overflowing))

    def encode_whole(self, text: str, second: str | None) -> Encoded:
        """The tokens of a text, or of two joined as the model reads pairs, special tokens included."""
        encoding = self._encode(text, second)
        return Encoded(list(encoding.ids), list(encoding.type_ids))

    def _encode(self, text: str, second: str | None) -> Encoding:
        return self._tokenizer.encode(text, second, add_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, all of them tokens; control tokens are left out, broken UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def length(self, ids: Iterable[int]) -> int:
        """Characters of the ids' ordinary tokens as the vocabulary spells them; their text is hardly longer."""
        controls = set(self.controls.values())
        return sum(len(self._tokenizer.id_to_token(i) or "") for i in ids if i not in controls)


def _longest_first(contents: Iterable[str]) -> re.Pattern[str] | None:
    """Matches added tokens as `tokenizers` does: leftmost, longest."""
    ordered = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _rename(tokenizer: dict[str, Any], alias: dict[str, str]) -> None:
    """Rename the control tokens of a parsed `tokenizer.json`, in place."""
    for token in tokenizer["added_tokens"]:
        if token["content"] in alias:
            if token.get("single_word"):
                raise EngineError("TOKENIZER_INVALID", "a special token with single_word is not supported")
            token["content"] = alias[token["content"]]
    model = tokenizer["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {alias.get(text, text): number for text, number in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[alias.get(text, text), score] for text, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = alias.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if _merged(merge) not in alias]


def _merged(merge: str | list[str]) -> str:
    """What a BPE merge makes; older files write it as two words in one string."""
    return "".join(merge.split(" ", 1) if isinstance(merge, str) else merge)
