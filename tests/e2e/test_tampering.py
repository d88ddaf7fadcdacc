"""Tampered with: refused by name, nothing left of it; and no secret in any log."""

import json

import pytest

from appliance.client import CloisterError
from tests.e2e.appliance import ALIAS, Appliance, build_bundle, flip_bit, other_weights

CANARY = "zebra-canary-4711"


def test_prompts_and_keys_are_in_no_log(appliance: Appliance) -> None:
    with appliance.client() as client:
        list(client.chat(ALIAS, [{"role": "user", "content": CANARY}], temperature=0, max_tokens=4))
        with pytest.raises(CloisterError) as error:
            list(client.generate(ALIAS, text=CANARY, temperature=float("inf")))
    secret = (appliance.credentials / "api.key").read_text().strip()
    written = appliance.logs() + json.dumps(appliance.records()) + str(error.value)
    assert "ready" in written
    assert CANARY not in written
    assert secret not in written
    assert secret.split("_")[2] not in written


def test_a_weight_file_changed_after_import_is_refused_at_load(appliance: Appliance) -> None:
    weights = max(
        (appliance.home / "store" / "sha256").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0
    )
    mode, size = weights.stat().st_mode, weights.stat().st_size
    weights.chmod(0o600)
    flip_bit(weights, size - 1)
    try:
        done = appliance.cloister("model", "load", "demo-notes-s", "--as", "spoilt", expect=3)
    finally:
        flip_bit(weights, size - 1)
        weights.chmod(mode)
        appliance.cloister("model", "unload", "spoilt")
    assert "WEIGHTS_DIGEST_MISMATCH" in done.stderr


def test_a_tampered_bundle_is_refused_and_leaves_nothing(appliance: Appliance) -> None:
    tampered = build_bundle(appliance.home.parent, other_weights(appliance.home.parent), sequence=20)
    before = sorted((appliance.home / "store" / "sha256").rglob("*"))
    flip_bit(tampered, tampered.stat().st_size // 2)
    done = appliance.cloister("bundle", "import", str(tampered), expect=3)
    assert "CHUNK_DIGEST" in done.stderr
    assert sorted((appliance.home / "store" / "sha256").rglob("*")) == before
