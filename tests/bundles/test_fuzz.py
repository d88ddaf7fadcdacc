"""Whatever bytes a bundle has, its parsers accept and mean it, or refuse with a code that is documented.

    pytest tests/bundles/test_fuzz.py -m slow -s        # CLOISTER_FUZZ_SECONDS for each target, 120 where unset

The long run prints the seed of every round; CLOISTER_FUZZ_SEED begins with another.
"""

import os
import re
import time
import tracemalloc
from itertools import count
from pathlib import Path
from random import Random, SystemRandom

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from bundles.format.errors import BundleError
from tests.bundles.forging import Ceremony, Draft
from tests.bundles.fuzzing import Target, targets
from tests.bundles.hostile_content import llama

# How many documents of each kind are tried where the clock does not decide: about 30 s in all.
NAMES = {
    "container": 150,
    "bundle": 40,
    "trust bundle": 150,
    "json": 250,
    "manifest": 250,
    "signed manifest": 250,
    "root": 100,
    "revocations": 150,
    "publisher's statement": 100,
    "publisher's signature": 150,
    "publisher's certificate": 60,
    "safetensors": 200,
    "path": 250,
}
# Of processor time and of memory, for a document of a few KiB: far more than any takes, far less than a bomb does.
MOST_SECONDS = 5.0
MOST_BYTES = 64 << 20


@pytest.fixture(scope="module")
def known() -> dict[str, Target]:
    keys, (config, weights) = Ceremony(), llama()
    files = {"config.json": config, "model.safetensors": weights, "tokenizer.json": b"{}"}
    return targets(Draft.made(keys, keys.root_document(1), files, 1))


@pytest.fixture(scope="module")
def documented() -> frozenset[str]:
    page = (Path(__file__).parents[2] / "docs" / "bundle-format.md").read_text()
    return frozenset(re.findall("`([A-Z][A-Z0-9_]+)`", page))


def _attempt(target: Target, raw: bytes, documented: frozenset[str]) -> None:
    began, refusal = time.process_time(), None
    tracemalloc.start()
    try:
        target.parse(raw)
    except BundleError as error:
        refusal = error
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert refusal is None or (refusal.code in documented and len(refusal.message) < 2000), refusal
    assert peak < MOST_BYTES
    assert time.process_time() - began < MOST_SECONDS


def _round(target: Target, documented: frozenset[str], random: Random) -> None:
    _attempt(target, target.wrap(target.change(random, random.choice(target.seeds))), documented)


def test_every_target_accepts_what_it_starts_from(known: dict[str, Target]) -> None:
    assert known.keys() == NAMES.keys()
    for target in known.values():
        for document in target.seeds:
            target.parse(target.wrap(document))


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_document_is_refused_or_means_what_it_says(
    name: str, known: dict[str, Target], documented: frozenset[str]
) -> None:
    @settings(max_examples=NAMES[name], deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False))
    def fuzz(random: Random) -> None:
        _round(known[name], documented, random)

    fuzz()


@pytest.mark.slow
@pytest.mark.timeout(24 * 3600)
@pytest.mark.parametrize("name", NAMES)
def test_no_changed_document_is_misread_for_as_long_as_it_is_tried(
    name: str, known: dict[str, Target], documented: frozenset[str]
) -> None:
    first = int(os.environ.get("CLOISTER_FUZZ_SEED") or SystemRandom().randrange(2**32))
    until = time.monotonic() + float(os.environ.get("CLOISTER_FUZZ_SECONDS") or 120)
    for number in count(first):
        print(f"{name}: CLOISTER_FUZZ_SEED={number}", flush=True)

        @seed(number)
        @settings(max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.randoms(use_true_random=False))
        def fuzz(random: Random) -> None:
            _round(known[name], documented, random)

        fuzz()
        if time.monotonic() > until:
            return
