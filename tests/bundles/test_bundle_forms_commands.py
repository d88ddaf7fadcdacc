"""`cloister bundle` for every form of a bundle, and its page for people, as a release engineer types it."""

import base64
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from appliance.cli.main import main
from bundles.content import inspector
from bundles.trust.keys import pem_of
from bundles.trust.signers import PrivateSigner, new_signer
from tests.bundles.making import (
    INSPECTOR,
    forge_manifest,
    make_bundle,
    make_model,
    make_root,
    members_of,
    replace_member,
    safetensors,
    sha256,
)
from tests.bundles.making import Trust as Keys
from tests.bundles.trusting import Authority


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspector.Inspector.__init__, "__defaults__", (INSPECTOR.command, 120.0, 60, 8 * 2**30))


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A root of trust over a release, a publisher's and the site's key, each in a file with its public half."""
    folder = tmp_path / "keys"
    folder.mkdir()
    schemes = {"release": "ed25519", "publisher": "ecdsa-sha2-nistp384", "site-publisher": "ecdsa-sha2-nistp256"}
    held: dict[str, PrivateSigner] = {"root": new_signer("ed25519")}
    held |= {role: new_signer(scheme) for role, scheme in schemes.items()}  # type: ignore[arg-type]  # schemes
    for role, signer in held.items():
        _save(folder / role, signer)
    (folder / "root.json").write_bytes(make_root(1, {role: [signer] for role, signer in held.items()}).raw)
    return folder


def _save(path: Path, signer: PrivateSigner) -> None:
    from bundles.trust.keys import save_private_key

    save_private_key(signer.private, path.with_suffix(".key"))
    path.with_suffix(".pub").write_text(pem_of(signer.key.public_key))


def _run(*words: str | Path) -> int:
    return main([*map(str, words)])


def _json(capsys: pytest.CaptureFixture[str], *words: str | Path, status: int = 0) -> dict[str, object]:
    capsys.readouterr()
    assert main(["--json", *map(str, words)]) == status
    value: dict[str, object] = json.loads(capsys.readouterr().out)
    return value


def _words(model: Path, out: Path, sequence: int = 1) -> tuple[str | Path, ...]:
    numbers = ("--version", f"1.{sequence}", "--sequence", str(sequence), "--chunk-size", "4KiB")
    return ("bundle", "build", "--model", model, "--name", "tiny", "--out", out, *numbers)


def _signing(keys: Path) -> tuple[str | Path, ...]:
    release, publisher = keys / "release.key", keys / "publisher.key"
    return ("--root", keys / "root.json", "--release-key", release, "--publisher-key", publisher)


def _large(folder: Path) -> Path:
    """Over a megabyte, of which no chunk is like another."""
    model = make_model(folder)
    data = b"".join(i.to_bytes(4, "little") for i in range(350_000))
    (model / "model.safetensors").write_bytes(safetensors({"w": ("U8", [len(data)], [0, len(data)])}, data))
    return model


def test_a_bundle_in_volumes_is_built_signed_verified_and_inspected_by_its_first(
    tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b"
    words = (*_words(_large(tmp_path / "m"), out), "--volume-size", "2MiB")
    built = _json(capsys, *words)
    volumes = [Path(str(path)) for path in built["volumes"]]  # type: ignore[attr-defined]  # JSON
    assert [path.name for path in volumes] == ["b.001", "b.002"]
    assert built["bundle"] == str(volumes[0])
    assert max(path.stat().st_size for path in volumes) <= 2 * 1024 * 1024
    assert _run("bundle", "sign", volumes[0], *_signing(keys)) == 0
    assert _run("bundle", "verify", volumes[0], "--root", keys / "root.json") == 0
    assert _run("bundle", "inspect", volumes[0]) == 0
    assert "volumes       2, carried in one after the other" in capsys.readouterr().out
    capsys.readouterr()
    assert _run("bundle", "verify", volumes[1], "--root", keys / "root.json") == 3
    assert "error: VOLUME_ORDER: " in capsys.readouterr().err
    volumes[1].unlink()
    assert _run("bundle", "verify", volumes[0], "--root", keys / "root.json") != 0
    assert "error: VOLUME_MISSING: " in capsys.readouterr().err


def test_a_folder_is_built_signed_and_verified(
    tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b"
    assert _run(*_words(make_model(tmp_path / "m"), out), "--directory", *_signing(keys)) == 0
    assert (out / "manifest.dsse.json").is_file()
    assert _run("bundle", "verify", out, "--root", keys / "root.json") == 0
    (out / "c" / "surplus").write_text("x")
    assert _run("bundle", "verify", out, "--root", keys / "root.json") == 3
    assert "error: CONTAINER_UNLISTED: " in capsys.readouterr().err


def test_a_delta_says_what_it_would_change(tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, delta, model = tmp_path / "base", tmp_path / "delta", make_model(tmp_path / "m")
    root = ("--root", keys / "root.json")
    assert _run(*_words(model, base), *_signing(keys)) == 0
    (model / "NOTICE.txt").write_text("new")
    (model / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    assert _run(*_words(model, delta, 2), "--base", base, "--licence", "MIT", *_signing(keys)) == 0
    assert delta.stat().st_size < base.stat().st_size
    assert _run("bundle", "verify", delta, *root) == 3
    assert "error: BASE_ABSENT: " in capsys.readouterr().err
    assert _run("bundle", "verify", delta, *root, "--base", base) == 0
    seen = _json(capsys, "bundle", "inspect", delta, *root, "--against", base)
    found = seen["difference"]
    assert isinstance(found, dict)
    assert (found["before"], found["after"], found["same"]) == ("tiny@1.1", "tiny@1.2", 4)
    assert (found["added"], found["removed"], [*found["changed"]]) == (
        {"NOTICE.txt": 3},
        {},
        ["chat_template.jinja"],
    )
    assert found["facts"]["licences"] == {"before": "NOASSERTION", "after": "MIT"}
    assert found["new_bytes"] == 3 + len("{{ messages[-1].content }}")
    assert _run("bundle", "inspect", delta, *root, "--against", base) == 0
    page = capsys.readouterr().out
    for line in ("  with          tiny@1.1", "  licences      NOASSERTION -> MIT", "  + NOTICE.txt"):
        assert line in page
    assert "holds only what changed since" in page


def test_an_installed_version_is_compared_by_its_record(
    tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = tmp_path / "b", make_model(tmp_path / "m")
    assert _run(*_words(model, out, 2)) == 0
    record = {
        "name": "tiny",
        "version": "1.1",
        "model_digest": "0" * 64,
        "sequence": 1,
        "kind": "model",
        "architecture": "LlamaForCausalLM",
        "files": [{"path": "old.txt", "size": 7, "sha256": "1" * 64}],
        "licences": [{"spdx": "MIT", "sha256": "2" * 64, "accept": True}],
        "canaries": [],
        "canary_pass_percent": 100,
    }
    path = tmp_path / "1.json"
    path.write_text(json.dumps(record))
    found = _json(capsys, "bundle", "inspect", out, "--against", path)["difference"]
    assert isinstance(found, dict)
    assert (found["before"], found["removed"]) == ("tiny@1.1", {"old.txt": 7})
    assert found["facts"]["licences"] == {"before": "MIT (to be accepted)", "after": "NOASSERTION"}
    for wrong in ("[]", "{}", json.dumps(record | {"files": [{}]})):
        path.write_text(wrong)
        assert _run("bundle", "inspect", out, "--against", path) == 1
        assert "error: RECORD_UNREADABLE: " in capsys.readouterr().err


def test_a_command_signs_for_public_keys(tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "hsm.py"
    program.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from bundles.trust.signers import FileSigner\n"
        "sys.stdout.buffer.write(FileSigner(Path(sys.argv[1])).sign(sys.stdin.buffer.read()))\n"
    )

    def command(key: str) -> str:
        return shlex.join([sys.executable, str(program), str(keys / f"{key}.key")])

    out, root = tmp_path / "b", ("--root", keys / "root.json")
    assert _run(*_words(make_model(tmp_path / "m"), out)) == 0
    publisher = ("--publisher-key", keys / "publisher.pub", "--sign-with", command("publisher"))
    release = ("--release-key", keys / "release.pub", "--sign-with", command("release"))
    assert _run("bundle", "sign", out, *root, *publisher) == 0
    assert _run("bundle", "sign", out, *root, "--release-key", keys / "release.key", *release[2:]) == 2
    assert _run("bundle", "sign", out, *root, *release[:2], "--sign-with", command("publisher")) != 0
    assert "error: SIGNER_FAILED: " in capsys.readouterr().err
    assert _run("bundle", "sign", out, *root, *release) == 0
    assert _run("bundle", "verify", out, *root) == 0
    capsys.readouterr()
    assert _run("bundle", "sign", out, *root, *release[:2]) == 2  # a public key signs nothing by itself
    assert "--sign-with" in capsys.readouterr().err


def test_the_site_signs_what_its_publisher_did_not(
    tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = tmp_path / "b", make_model(tmp_path / "m")
    release = ("--root", keys / "root.json", "--release-key", keys / "release.key")
    assert _run(*_words(model, out), *release, "--site-publisher", keys / "site-publisher.key") == 0
    seen = _json(capsys, "bundle", "verify", out, "--root", keys / "root.json")
    assert seen["publisher_role"] == "site-publisher"
    assert _run("bundle", "inspect", out, "--root", keys / "root.json") == 0
    assert "publisher     role site-publisher" in capsys.readouterr().out


def test_an_adapter_is_built_for_the_models_it_works_with(
    tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out, digest = tmp_path / "a", tmp_path / "b", "ab" * 32
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(safetensors({"a": ("F32", [1], [0, 4])}, bytes(4)))
    (folder / "LICENSE").write_text("Do as you like.\n")
    needs = ("--requires", f"tiny={digest}", "--requires", "small")
    assert _run(*_words(folder, out), "--kind", "adapter", *needs, *_signing(keys)) == 0
    assert _run("bundle", "inspect", out) == 0
    page = capsys.readouterr().out
    assert "tiny@1.1 (adapter), sequence 1" in page
    assert "small: any version" in page
    assert digest in page
    assert _run(*_words(folder, out), "--kind", "adapter") == 2
    for wrong in ("Tiny", "tiny=12", "=x"):
        with pytest.raises(SystemExit) as ended:
            _run(*_words(folder, out), "--kind", "adapter", "--requires", wrong)
        assert ended.value.code == 2


def test_the_same_command_gives_the_same_bytes_when_told_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "m")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1760000000")
    for name in ("a", "b"):
        assert _run(*_words(model, tmp_path / name), "--expires-days", "30") == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert _run(*_words(model, tmp_path / "c"), "--issued-at", "2025-10-09T08:53:20Z", "--expires-days", "30") == 0
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    assert _run(*_words(model, tmp_path / "d")) == 2


@pytest.mark.parametrize(
    "option",
    [
        ("--volume-size", "0"),
        ("--volume-size", "1.5GB"),
        ("--volume-size", "1GB", "--directory"),
        ("--gpu-memory", "much"),
        ("--gpus", "1025"),
        ("--issued-at", "2026-01-01"),
        ("--publisher-key", "a", "--site-publisher", "b"),
    ],
)
def test_options_that_make_no_sense_are_bad_usage(tmp_path: Path, option: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        _run(*_words(tmp_path / "m", tmp_path / "b"), *option)
    assert ended.value.code == 2


def test_a_time_beyond_the_calendar_is_bad_usage(tmp_path: Path) -> None:
    late = ("--issued-at", "9999-12-31T00:00:00Z", "--expires-days", "2")
    assert _run(*_words(tmp_path / "m", tmp_path / "b"), *late) == 2


def test_the_page_is_no_wider_than_80_columns_and_spells_out_what_is_not_text(
    tmp_path: Path, trust: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = make_model(tmp_path / "m"), tmp_path / "b"
    (model / "README.md").write_text(
        "---\nlicense: mit\npipeline_tag: text-generation\nbase_model: some/other\ndatasets: [a/b]\n---\n"
    )
    deep = model / ("d" * 120) / ("e" * 120)
    deep.mkdir(parents=True)
    (deep / "notes.txt").write_text("x")
    for i in range(30):
        (model / f"{i}.txt").write_text(str(i))
    assert _run(*_words(model, out), "--target", "ward\x1b[31m-3", "--gpu-memory", "80GiB", "--gpus", "2") == 0
    forge_manifest(out, trust, lambda m: m["canary"][0]["messages"][0].update(content="\x1b]0;evil\x07" * 30))
    forge_manifest(out, trust, lambda m: m["licences"][0].update(spdx="MIT\x9b31m"))
    capsys.readouterr()
    assert _run("bundle", "inspect", out) == 0
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= 80
    assert not [character for character in page if character != "\n" and not character.isprintable()]
    for said in (
        "NOT VERIFIED: no root of trust was given",
        "ward\\x1b[31m-3",
        "GPUs          2 with 80.0 GiB each",
        "slsa.json",
        "SLSA v1: built by cloister",
        "CycloneDX 1.6: 37 files; task",
        "made from",
        "1 (1 exact); 100% must pass",
        "and 17 more: all with --json",
    ):
        assert said in page, said


def _state(path: Path, keys: Keys, name: str, statement: object) -> None:
    """Put another statement into a bundle, as its manifest has it."""
    raw = json.dumps(statement).encode()
    replace_member(path, name, lambda _: raw)

    def describe(fields: dict[str, Any]) -> None:
        entry = next(entry for entry in fields["attestations"] if entry["member"] == name)
        entry.update(size=len(raw), sha256=sha256(raw))

    forge_manifest(path, keys, describe)


def _model_card(**known: object) -> dict[str, object]:
    bom = {"bomFormat": "CycloneDX", "specVersion": "1.6", "components": []}
    return bom | {"metadata": {"component": {"modelCard": {"modelParameters": known}}}}


def test_statements_and_certificates_of_any_form_have_a_page_and_a_short_one(
    tmp_path: Path, trust: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    out = make_bundle(tmp_path / "b", trust)
    builder: dict[str, object] = {"runDetails": {"builder": {"version": {"x": "1"}}}}
    slsa: dict[str, object] = {"predicateType": "https://slsa.dev/provenance/v1"}
    for sources in (5, None, "x", [1, {"name": 2}]):
        predicate = builder | {"buildDefinition": {"resolvedDependencies": sources}}
        _state(out, trust, "attest/slsa.json", slsa | {"predicate": predicate})
        _state(out, trust, "attest/mlbom.json", _model_card(datasets=sources))
        assert _run("bundle", "inspect", out) == 0
    _state(out, trust, "attest/mlbom.json", _model_card(task="x" * 3_000_000))
    replace_member(out, "oms.sig", _with_certificate_that_is_no_text)
    capsys.readouterr()
    assert _run("bundle", "inspect", out) == 0
    page = capsys.readouterr().out
    assert "certificate   one that cannot be read" in page
    assert len(page.splitlines()) < 100


def _with_certificate_that_is_no_text(raw: bytes) -> bytes:
    """An OMS signature by a certificate whose subject is no UTF-8; its form is that of any other."""
    issued = Authority.new("Somebody").certificate.public_bytes(Encoding.DER)
    der = issued.replace(b"Somebody", b"Some\xff\xfe\xffy")
    signature = json.loads(raw)
    chain = {"certificates": [{"rawBytes": base64.b64encode(der).decode()}]}
    signature["verificationMaterial"] = {"x509CertificateChain": chain, "tlogEntries": []}
    return json.dumps(signature).encode()


def test_an_expired_bundle_and_a_root_that_does_not_know_its_signers_are_told_plainly(
    tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b"
    issued = ("--issued-at", "2025-01-01T00:00:00Z", "--expires-days", "1")
    assert _run(*_words(make_model(tmp_path / "m"), out), *issued, *_signing(keys)) == 0
    assert _run("bundle", "inspect", out, "--root", keys / "root.json") == 0
    assert "2025-01-02T00:00:00Z: EXPIRED" in capsys.readouterr().out
    assert "attest/mlbom.json" in dict(members_of(out))
