"""Hostile bundles: the 84 refusals of the threat model, by number, each forged from a good bundle.

    python -m tests.bundles.hostile FOLDER

writes one of each into FOLDER, as far as a file alone can attack, and the trust root to judge them with. The list
is section 2 of the research page on signed offline bundles; its numbers and names are kept here.
"""

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tests.bundles import hostile_certificates, hostile_content, hostile_form, hostile_trust
from tests.bundles.attacks import Attack, Refusal, Scene
from tests.bundles.forging import Ceremony, Draft
from tests.bundles.hostile_content import llama

_TEMPLATE = "{%- for m in messages -%}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{%- endfor -%}"

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


def make_model(folder: Path) -> Path:
    """A model that the real engine-inspect accepts."""
    from tests.engine.tiny_models import byte_tokenizer, write_tokenizer

    folder.mkdir()
    config, weights = llama(6)
    (folder / "config.json").write_bytes(config)
    (folder / "model.safetensors").write_bytes(weights)
    write_tokenizer(folder, byte_tokenizer(), _TEMPLATE)
    (folder / "LICENSE").write_text("Be good.\n")
    return folder


def make_drafts(model: Path) -> tuple[Draft, Draft]:
    """Release 6, which is good, and release 5 of the same keys, which shares no file with it."""
    keys = Ceremony()
    root = keys.root_document(1)
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    other = {path: raw + b"\n" for path, raw in files.items()} | {"model.safetensors": llama(5)[1]}
    return Draft.made(keys, root, files, 6), Draft.made(keys, root, other, 5)


def main(folder: Path) -> None:
    """Write the bundles, each in a folder called after its number and its code."""
    folder.mkdir()
    model = make_model(folder / "model")
    good, base = make_drafts(model)
    (folder / "1.root.json").write_bytes(good["trust/1.root.json"])
    for place, refusal in enumerate(REFUSALS):
        medium = folder / f"{refusal.number:02}-{refusal.code}-{place}"
        medium.mkdir()
        attack: Attack = refusal.prepare(Scene(medium, good, base, model))
        with suppress(FileNotFoundError):
            (medium / "raw").unlink()
        print(f"{attack.source}: {refusal.name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
