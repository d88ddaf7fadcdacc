"""Whether a well-signed release is for here and now."""

from datetime import datetime
from typing import Any

import pytest

from bundles.format.errors import BundleError
from bundles.trust.policy import BUILT_AT, MAX_LEAP, Floor, Site, check_policy, clock_floor, verify_head
from bundles.trust.revocation import Revocations
from bundles.trust.signers import new_signer
from tests.bundles.trusting import DAY, NOW, head_of, revocations, root_of

PUBLISHER = new_signer("ecdsa-sha2-nistp256")
ROOT = root_of({"publisher": [PUBLISHER.key]})
HERE, ELSEWHERE = "5e" * 32, "e5" * 32


def _check(site: Site | None = None, revoking: Revocations | None = None, **changes: Any) -> None:
    check_policy(verify_head(head_of(PUBLISHER, **changes), ROOT, NOW, revoking), site or Site(NOW))


def _refusal(site: Site | None = None, revoking: Revocations | None = None, **changes: Any) -> str:
    with pytest.raises(BundleError) as error:
        _check(site, revoking, **changes)
    return error.value.code


def _licensed(spdx: str) -> dict[str, Any]:
    return {"licences": ({"member": "licence/L", "size": 1, "sha256": HERE, "spdx": spdx, "accept": False},)}


def test_an_adapter_needs_its_model_here() -> None:
    here = Site(NOW, models=(("base", HERE),))
    adapter = {"kind": "adapter", "requires": ({"name": "base", "model_digest": HERE},)}
    _check(here, **adapter)
    _check(Site(NOW), **adapter)
    _check(here, kind="draft", requires=({"name": "base", "model_digest": None},))
    for name, digest in (("base", ELSEWHERE), ("other", HERE), ("other", None)):
        requires = ({"name": name, "model_digest": digest},)
        assert _refusal(here, kind="adapter", requires=requires) == "REQUIRES_UNMET"
    assert _refusal(Site(NOW, models=()), **adapter) == "REQUIRES_UNMET"


def test_a_delta_needs_its_base_here() -> None:
    _check(Site(NOW, models=(("tiny", HERE),)), base=HERE)
    assert _refusal(Site(NOW, models=(("tiny", HERE),)), base=ELSEWHERE) == "BASE_ABSENT"


def test_a_site_s_list_of_licences_is_kept_to() -> None:
    site = Site(NOW, licences=frozenset({"MIT"}))
    _check(site, **_licensed("MIT OR GPL-3.0-only"))
    _check(Site(NOW), **_licensed("GPL-3.0-only"))
    assert _refusal(site, **_licensed("GPL-3.0-only")) == "LICENCE_NOT_ALLOWED"
    assert _refusal(site, **_licensed("MIT OR")) == "LICENCE_EXPRESSION"
    assert _refusal(Site(NOW, licences=frozenset())) == "LICENCE_NOT_ALLOWED"


def test_a_release_that_needs_more_than_there_is_is_refused() -> None:
    needs = {"resources": {"gpu_memory": 80, "gpus": 2}}
    _check(Site(NOW, gpu_memory=80, gpus=2), **needs)
    _check(Site(NOW), **needs)
    for site in (Site(NOW, gpu_memory=79, gpus=2), Site(NOW, gpu_memory=80, gpus=1), Site(NOW, gpus=0)):
        assert _refusal(site, **needs) == "RESOURCES_INSUFFICIENT"


@pytest.mark.parametrize("accepted", [None, NOW - 30 * DAY])
def test_a_moment_that_has_surely_passed_is_the_latest_of_three(accepted: datetime | None) -> None:
    assert clock_floor(accepted, None) == max(accepted or BUILT_AT, BUILT_AT)
    assert clock_floor(accepted, revocations()) == NOW - DAY
    assert clock_floor(NOW, revocations()) == NOW


def test_a_clock_behind_any_of_them_is_refused() -> None:
    behind = Site(NOW - 3 * DAY)
    assert _refusal(behind, revocations()) == "CLOCK_BEHIND"
    assert _refusal(Site(BUILT_AT - 2 * DAY)) == "CLOCK_BEHIND"
    assert _refusal(behind) == "NOT_YET_VALID"


def test_a_sequence_that_leaves_no_room_for_later_ones_is_refused() -> None:
    at = Site(NOW, floors=(("tiny", Floor(5, HERE)),))
    _check(at, sequence=5 + MAX_LEAP)
    assert _refusal(at, sequence=6 + MAX_LEAP) == "SEQUENCE_FAST_FORWARD"
    assert _refusal(sequence=2**53 - 1) == "SEQUENCE_FAST_FORWARD"


def test_sequences_below_a_minimum_were_revoked() -> None:
    minimum = revocations(minimum_sequences={"tiny": 7, "other": 99})
    _check(None, minimum, sequence=7)
    assert _refusal(None, minimum, sequence=6) == "ROLLBACK_REFUSED"


def test_revoking_what_a_thief_signed_and_naming_a_minimum_opens_the_way_again() -> None:
    """TUF 5.3.11, for releases: the floor that the stolen key set does not hold."""
    at = Site(NOW, floors=(("tiny", Floor(2**40, HERE)),))
    assert _refusal(at, sequence=8) == "ROLLBACK_REFUSED"
    assert _refusal(at, revocations(manifests=[HERE]), sequence=8) == "ROLLBACK_REFUSED"
    recovering = revocations(manifests=[HERE], minimum_sequences={"tiny": 8})
    _check(at, recovering, sequence=8)
    assert _refusal(at, recovering, sequence=7) == "ROLLBACK_REFUSED"
