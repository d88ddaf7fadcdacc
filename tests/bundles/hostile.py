"""Hostile bundles: the 84 refusals of the threat model, by number, each forged from a good bundle.

    python -m tests.bundles.hostile FOLDER

writes one of each into FOLDER, as far as a file alone can attack, and the trust root to judge them with. The list
is section 2 of the research page on signed offline bundles; its numbers and names are kept here.
"""

from collections.abc import Mapping

from tests.bundles import hostile_certificates, hostile_content, hostile_form, hostile_trust
from tests.bundles.attacks import Refusal

REFUSALS: tuple[Refusal, ...] = (
    *hostile_trust.SIGNATURES,
    *hostile_certificates.CERTIFICATES,
    *hostile_trust.ROOTS,
    *hostile_trust.POLICY,
    *hostile_form.JSON,
    *hostile_form.PATHS,
    *hostile_form.CONTAINER,
    *hostile_form.COMPRESSION,
    *hostile_form.FOLDERS,
    *hostile_form.VOLUMES,
    *hostile_form.MEDIA,
    *hostile_content.DIGESTS,
    *hostile_content.FORBIDDEN,
    *hostile_content.WEIGHTS,
    *hostile_content.CODE,
    *hostile_content.NEEDS,
)

# Codes of two numbers: the one that each belongs to, the one that has it too, and why nobody can tell them apart.
SHARED: Mapping[str, tuple[int, int, str]] = {
    "SIGNATURE_INVALID": (2, 8, "a signature that its key did not make, whoever made it and whatever was changed"),
    "OMS_SIGNATURE": (
        2,
        3,
        "of one signature that does not verify, nobody can say what was changed: it or the rest",
    ),
    "JSON_INTEGER": (31, 24, "2^63 is no integer of a document before it is a sequence"),
    "SOURCE_CHANGED": (71, 72, "a medium that grows is a medium that changes"),
    "CONTENT_CODE": (80, 76, "a program under another name is a program"),
}
