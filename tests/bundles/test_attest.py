"""Statements made at build: provenance, the bill of materials, and the model card they draw on."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from bundles.attest import facts as facts_of
from bundles.attest.card import read_card
from bundles.attest.facts import Facts
from bundles.attest.mlbom import bill_of_materials
from bundles.attest.slsa import provenance
from bundles.builder import build
from bundles.format.manifest import File, Licence, Model, Requirement
from tests.bundles.making import INSPECTOR, make_model, make_release, members_of, sha256

ISSUED = datetime(2026, 11, 1, 12, tzinfo=UTC)
CARD = """---
license: apache-2.0  # see LICENSE
pipeline_tag: text-generation
license_name: ~
base_model: "meta-llama/Llama-3.1-8B"
language: [en, 'de']
datasets:
- notes/one
  - notes/two
model-index:
  - name: x
    results: []
---
# A model
"""


def test_a_card_s_front_matter_is_read_as_far_as_it_is_plain() -> None:
    card = read_card(CARD)
    assert dict(card.fields) == {
        "license": ("apache-2.0",),
        "pipeline_tag": ("text-generation",),
        "base_model": ("meta-llama/Llama-3.1-8B",),
        "language": ("en", "de"),
        "datasets": ("notes/one", "notes/two"),
    }
    assert card.first("absent") == ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "license: mit\n",
        "---\nlicense: mit\n",  # never ends
        "---\nlicense: &anchor mit\n---\n",
        "---\nlicense: |\n  mit\n---\n",
        "---\nlicense: \x1b[31m\n---\n",
        "---\nlicense: {a: b}\n---\n",
        "---\nlicense: null\n---\n",
    ],
)
def test_a_card_that_is_not_plain_states_nothing(text: str) -> None:
    assert read_card(text).first("license") == ""


def _built(tmp_path: Path, **changes: Any) -> tuple[dict[str, bytes], Any]:
    model = make_model(tmp_path / "m")
    (model / "README.md").write_text(CARD)
    manifest = build(make_release(issued_at=ISSUED, **changes), model, tmp_path / "b", inspector=INSPECTOR)
    return dict(members_of(tmp_path / "b")), manifest


def test_the_bill_of_materials_lists_the_model_its_card_and_every_file(tmp_path: Path) -> None:
    members, manifest = _built(tmp_path)
    bom = json.loads(members["attest/mlbom.json"])
    assert (bom["bomFormat"], bom["specVersion"], bom["version"]) == ("CycloneDX", "1.6", 1)
    assert bom["metadata"]["timestamp"] == "2026-11-01T12:00:00Z"
    model = bom["metadata"]["component"]
    assert (model["type"], model["name"], model["version"]) == ("machine-learning-model", "tiny", "1.0.1")
    assert model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert model["pedigree"]["ancestors"][0]["name"] == "meta-llama/Llama-3.1-8B"
    parameters = model["modelCard"]["modelParameters"]
    assert (parameters["task"], parameters["modelArchitecture"]) == ("text-generation", "LlamaForCausalLM")
    assert [dataset["name"] for dataset in parameters["datasets"]] == ["notes/one", "notes/two"]
    said = {entry["name"]: entry["value"] for entry in model["modelCard"]["properties"]}
    assert said["cloister:parameters"] == str(manifest.model.parameters)
    assert said["cloister:layers"] == "1"  # of engine-inspect
    files = {c["name"]: c["hashes"] for c in bom["components"]}
    assert files == {file.path: [{"alg": "SHA-256", "content": file.sha256}] for file in manifest.files}
    (dependency,) = bom["dependencies"]
    assert set(dependency["dependsOn"]) == {component["bom-ref"] for component in bom["components"]}


def test_the_provenance_names_the_files_the_tool_and_how_it_was_told(tmp_path: Path) -> None:
    members, manifest = _built(tmp_path, targets=("ward-3",))
    statement = json.loads(members["attest/slsa.json"])
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    assert {s["name"]: s["digest"]["sha256"] for s in statement["subject"]} == {
        file.path: file.sha256 for file in manifest.files
    }
    definition, run = statement["predicate"]["buildDefinition"], statement["predicate"]["runDetails"]
    assert definition["externalParameters"]["targets"] == ["ward-3"]
    assert definition["externalParameters"]["sequence"] == 1
    assert run["builder"]["version"] == {"cloister": manifest.min_engine}
    assert run["metadata"]["startedOn"] == run["metadata"]["finishedOn"] == "2026-11-01T12:00:00Z"


def test_the_manifest_vouches_for_both_statements(tmp_path: Path) -> None:
    members, manifest = _built(tmp_path)
    listed = {document.member: document.sha256 for document in manifest.attestations}
    assert listed == {name: sha256(members[name]) for name in ("attest/slsa.json", "attest/mlbom.json")}


def _facts(**changes: Any) -> Facts:
    digest = "0" * 64
    fields: dict[str, Any] = {
        "name": "tiny",
        "version": "1",
        "sequence": 1,
        "kind": "adapter",
        "issued_at": "2026-11-01T12:00:00Z",
        "tool_version": "0.1.0",
        "files": tuple(
            File(
                path=f"{i}.txt", size=1, sha256=digest, media_type="text/plain", role="document", chunks=(digest,)
            )
            for i in range(3)
        ),
        "model": Model(
            architecture="LoRA",
            dtype="float32",
            quantisation=None,
            max_context_tokens=0,
            parameters=8,
            capabilities=(),
            tokenizer_sha256=None,
        ),
        "details": {"rank": "8"},
        "licences": (Licence(member="licence/L", size=1, sha256=digest, spdx="odd and own", accept=True),),
        "card": read_card(""),
        "requires": (Requirement(name="base", model_digest=digest), Requirement(name="other", model_digest=None)),
        "base": digest,
        "upstream": (digest, False),
        "parameters": {},
    }
    return Facts(**fields | changes)


def test_an_adapter_s_statements_name_what_it_needs_and_came_from() -> None:
    bom = json.loads(bill_of_materials(_facts()))
    models = [c["name"] for c in bom["components"] if c["type"] == "machine-learning-model"]
    assert models == ["base", "other"]
    assert bom["metadata"]["component"]["licenses"] == [{"license": {"name": "odd and own"}}]
    definition = json.loads(provenance(_facts()))["predicate"]["buildDefinition"]
    assert [d["name"] for d in definition["resolvedDependencies"]] == ["model.sig", "base", "base", "other"]
    assert definition["resolvedDependencies"][0]["annotations"]["coversTheseFiles"] is False


def test_versions_of_one_model_are_several_in_the_bill(tmp_path: Path) -> None:
    versions = tuple(Requirement(name="base", model_digest=digest) for digest in ("0" * 64, "1" * 64, None, None))
    bom = json.loads(bill_of_materials(_facts(requires=versions)))
    references = [c["bom-ref"] for c in bom["components"] if c["type"] == "machine-learning-model"]
    assert len(set(references)) == len(references) == 3
    assert [ref for ref in bom["dependencies"][0]["dependsOn"] if ref.startswith("model:")] == references


def test_equal_facts_give_equal_bytes_and_others_another_serial_number() -> None:
    assert bill_of_materials(_facts()) == bill_of_materials(_facts())
    assert provenance(_facts()) == provenance(_facts())
    one, other = (json.loads(bill_of_materials(_facts(sequence=n)))["serialNumber"] for n in (1, 2))
    assert one != other


def test_very_many_files_are_counted_where_they_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts_of, "MOST_BYTES", 100_000)
    (file, *_) = _facts().files
    files = tuple(replace(file, path=f"{i:03}-\u20ac{'x' * 500}.txt") for i in range(200))
    raw = bill_of_materials(_facts(files=files))
    assert len(raw) < 110_000
    assert len(provenance(_facts(files=files))) < 110_000
    said = {p["name"]: p["value"] for p in json.loads(raw)["metadata"]["component"]["modelCard"]["properties"]}
    assert said["cloister:files"] == "200"
    assert 40 < int(said["cloister:files-listed"]) < 60


def test_bills_of_materials_are_valid_by_the_schema_of_cyclonedx_1_6(tmp_path: Path) -> None:
    validation = pytest.importorskip("cyclonedx.validation.json", reason="cyclonedx-python-lib is not installed")
    schema = pytest.importorskip("cyclonedx.schema").SchemaVersion.V1_6
    members, _ = _built(tmp_path)
    for raw in (members["attest/mlbom.json"], bill_of_materials(_facts())):
        fault = validation.JsonStrictValidator(schema).validate_str(raw.decode())
        assert fault is None, fault
    broken = json.loads(members["attest/mlbom.json"]) | {"invented": 1}
    assert validation.JsonStrictValidator(schema).validate_str(json.dumps(broken)) is not None
