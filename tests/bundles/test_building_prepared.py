"""Bundles of models that are converted or quantised first: what they state, and what a failure leaves."""

import argparse
import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from appliance.cli import bundle_preparing
from appliance.cli.main import main
from bundles.builder import Quantisation, build, prepared, sign
from bundles.builder.preparing import Preparer
from bundles.builder.signing import Signing
from bundles.content import inspector
from bundles.format.errors import BundleError
from bundles.pipeline import Progress, State
from bundles.trust.roots import SITE_PUBLISHER
from bundles.trust.signers import new_signer
from bundles.verify import verify
from tests.bundles.making import INSPECTOR, make_model, make_release, make_root, members_of, sha256
from tests.engine.gguf_files import write_llama

COPIES = """
    import json, pathlib, shutil, sys
    asked = json.loads(sys.stdin.read())
    print(json.dumps({"stage": "quantising", "done": 1, "total": 2}), flush=True)
    source, out = pathlib.Path(asked["source"]), pathlib.Path(asked["out"])
    shutil.copytree(source, out, dirs_exist_ok=True)
    matrices = [{"name": "w", "rounded": 0.04, "error": 0.02, "tokens": 9}]
    calibration = {"sha256": "ab" * 32, "texts": 7, "held_out_texts": 1, "perplexity_before": 2.5,
                   "perplexity_after": 2.75}
    report = {"method": "error feedback", "bits": asked["bits"], "group": asked["group"], "matrices": matrices,
              "calibration": calibration}
    print(json.dumps({"ok": True, "report": report}))
"""
ISSUED = datetime(2026, 11, 1, 12, tzinfo=UTC)
INT4 = Quantisation(4, 128, Path("texts.jsonl"))


def stand_in(program: str) -> Preparer:
    """A process in the place of engine-prepare, which this folder does not own."""
    return Preparer((sys.executable, "-I", "-S", "-c", textwrap.dedent(program)))


def silent(progress: Progress) -> None:
    """Hears nothing."""


def build_quantised(tmp_path: Path, name: str = "b.bundle") -> Path:
    model = tmp_path / "m"
    if not model.exists():
        make_model(model)
        (model / "model.sig").write_bytes(b"as the publisher signed it")
    out = tmp_path / name
    with prepared(model, out, INT4, silent, stand_in(COPIES)) as source:
        build(
            make_release(issued_at=ISSUED), source.folder, out, inspector=INSPECTOR, preparation=source.preparation
        )
    return out


def statement(path: Path, member: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(dict(members_of(path))[member])
    return found


def test_what_is_quantised_states_its_sources_its_steps_and_where_the_whole_account_is(tmp_path: Path) -> None:
    out = build_quantised(tmp_path)
    predicate: dict[str, object] = statement(out, "attest/slsa.json")["predicate"]  # type: ignore[assignment]  # JSON
    match predicate:
        case {
            "buildDefinition": {"externalParameters": dict(parameters), "resolvedDependencies": list(sources)},
            "runDetails": {"byproducts": [{"name": "attest/preparation.json", "digest": {"sha256": digest}}]},
        }:
            assert parameters["preparation"][0]["bits"] == 4
            assert "matrices" not in parameters["preparation"][0]
            named = {each["name"]: each["digest"]["sha256"] for each in sources}
            assert named["model.safetensors"] == sha256((tmp_path / "m" / "model.safetensors").read_bytes())
            assert named["calibration"] == "ab" * 32
            account = dict(members_of(out))["attest/preparation.json"]
            assert digest == sha256(account)
            assert json.loads(account)["steps"][0]["matrices"][0]["error"] == 0.02
        case other:
            pytest.fail(f"{other}")
    bill = json.dumps(statement(out, "attest/mlbom.json"))
    assert '"cloister:prepared-bits", "value": "4"' in bill
    assert '"cloister:prepared-calibration-perplexity-after", "value": "2.75"' in bill


def test_the_page_says_what_was_done_and_names_a_few_of_the_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bundle", "inspect", str(build_quantised(tmp_path))]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "quantised to int4, perplexity 2.5 before and 2.75 after" in page
    assert "and 3 more" in page


def test_the_site_signs_what_is_quantised_and_the_publisher_s_signature_stays_as_provenance(
    tmp_path: Path,
) -> None:
    out = build_quantised(tmp_path)
    root_key, release, site = new_signer("ed25519"), new_signer("ed25519"), new_signer("ecdsa-sha2-nistp384")
    publisher = new_signer("ecdsa-sha2-nistp384")
    roles = {"root": [root_key], "release": [release], "publisher": [publisher], SITE_PUBLISHER: [site]}
    root = make_root(1, roles)
    sign(out, Signing(root, (release,), site, site=True))
    verified = verify(out, root, inspector=INSPECTOR)
    assert verified.publisher_role == SITE_PUBLISHER
    assert dict(members_of(out))["attest/upstream-model.sig"] == b"as the publisher signed it"


@pytest.mark.parametrize("gives", ["a key", "a signature"])
def test_a_publisher_signs_nothing_that_was_quantised_here(gives: str, tmp_path: Path) -> None:
    out = build_quantised(tmp_path)
    before = out.read_bytes()
    root_key, release, publisher = new_signer("ed25519"), new_signer("ed25519"), new_signer("ecdsa-sha2-nistp384")
    root = make_root(1, {"root": [root_key], "release": [release], "publisher": [publisher]})
    signing = Signing(root, (release,), publisher) if gives == "a key" else Signing(root, (release,), oms=b"{}")
    with pytest.raises(BundleError) as refused:
        sign(out, signing)
    assert refused.value.code == "SITE_MUST_SIGN"
    assert out.read_bytes() == before


def test_the_same_input_is_the_same_bundle_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    first, second = (build_quantised(tmp_path, name) for name in ("a.bundle", "b.bundle"))
    assert first.read_bytes() == second.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"m", "a.bundle", "b.bundle"}


def test_progress_is_passed_on(tmp_path: Path) -> None:
    told: list[Progress] = []
    with prepared(make_model(tmp_path / "m"), tmp_path / "b", INT4, told.append, stand_in(COPIES)):
        pass
    *hashed, last = told
    assert last == Progress(State.PREPARING, 1, 2, file="quantising")
    assert hashed[-1].bytes_done == hashed[-1].bytes_total > 0


def test_a_plain_folder_is_built_from_as_it_is_and_no_process_is_started(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    with prepared(model, tmp_path / "b", None, silent, Preparer(("/nonexistent",))) as source:
        assert (source.folder, source.preparation) == (model, None)


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("""print('{"ok": false, "code": "CALIBRATION_INVALID", "message": "line 3"}')""", "CALIBRATION_INVALID"),
        ("""print('{"ok": false, "code": "x", "message": "line 3"}')""", "PREPARE_FAILED"),
        ("""print('{"ok": true, "report": 5}')""", "PREPARE_FAILED"),
        ("""print('gibberish')""", "PREPARE_FAILED"),
        ("""print('{"stage": 5}')""", "PREPARE_FAILED"),
        ("""print('{"stage"')""", "PREPARE_FAILED"),
        ("""raise SystemExit(3)""", "PREPARE_FAILED"),
        ("""print('{"ok": true, "report": {}}'); raise SystemExit(1)""", "PREPARE_FAILED"),
        ("""import os, signal; os.kill(os.getpid(), signal.SIGKILL)""", "PREPARE_FAILED"),
        ("""import os; os.close(0); print('{"ok": true}')""", "PREPARE_FAILED"),
    ],
)
def test_a_process_that_refuses_fails_or_answers_nonsense_leaves_nothing(
    program: str, code: str, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "m")
    with (
        pytest.raises(BundleError) as refused,
        prepared(model, tmp_path / "b", INT4, silent, stand_in(program)),
    ):
        pass
    assert refused.value.code == code
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


def gone(pid: int) -> bool:
    """Whether a process has ended; waits for it."""
    for _ in range(300):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


@contextmanager
def quantising(place: Path) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """`cloister bundle build --quantize` with an engine-prepare that waits, and that one's process id."""
    make_model(place / "m")
    waits = """
        import os, signal, time
        from engine.prepare import __main__
        def wait(question):
            __main__.write({"stage": "pid", "done": os.getpid(), "total": 0})
            time.sleep(600)
        __main__._prepare = wait
        __main__.main()
    """
    program = f"""
        import sys
        from bundles.builder import preparing
        from appliance.cli.main import main
        from appliance.cli.progress import ProgressBar
        command = (sys.executable, "-c", {textwrap.dedent(waits)!r})
        preparing.Preparer.__init__.__defaults__ = (command,)
        def told(bar, state, done, total, file=""):
            if file == "pid":
                print(done, flush=True)
        ProgressBar.update = told
        sys.exit(main(["bundle", "build", "--quantize", "int8", "--name", "x", "--version", "1", "--sequence", "1",
                       "--model", {str(place / "m")!r}, "--out", {str(place / "b")!r}]))
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=-1, stderr=-3) as outer:
        try:
            assert outer.stdout is not None
            yield outer, int(outer.stdout.readline())
        finally:
            outer.kill()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_request_to_end_ends_the_process_and_leaves_nothing(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    with quantising(tmp_path) as (outer, inner):
        outer.send_signal(number)
        assert outer.wait(30) == status
        assert gone(inner)
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


def test_a_killed_build_takes_its_process_along_and_the_next_one_removes_what_it_left(tmp_path: Path) -> None:
    with quantising(tmp_path) as (outer, inner):
        (hidden,) = tmp_path.glob(".b.preparing-*")
        with prepared(tmp_path / "m", tmp_path / "c", INT4, silent, stand_in(COPIES)):
            assert hidden.exists()  # it is at work
        outer.kill()
        outer.wait(30)
        assert gone(inner)
    assert hidden.exists()
    mine = tmp_path / ".b.preparing-notes"
    mine.mkdir()
    with prepared(tmp_path / "m", tmp_path / "c", INT4, silent, stand_in(COPIES)):
        assert not hidden.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"m", mine.name}


def test_embeddings_are_quantised_to_int8_where_no_bits_are_said(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=tmp_path)
    bundle_preparing.add_options(parser)
    for words, bits in (((), 0), (("--quantize-embeddings",), 8), (("--quantize-embeddings", "int4"), 4)):
        asked = bundle_preparing.read_quantisation(parser.parse_args(["--quantize", "int8", *words]))
        assert asked is not None
        assert asked.embeddings == bits


@pytest.mark.parametrize(
    "words",
    [
        ("--quantize", "int4"),
        ("--quantize", "int4", "--calibration", "/nonexistent/texts.jsonl"),
        ("--quantize", "int8", "--group", "32"),
        ("--group", "32"),
        ("--calibration", "texts.jsonl"),
        ("--quantize-embeddings",),
        ("--quantize-embeddings", "keep"),
        ("--quantize", "int8", "--quantize-embeddings", "keep"),
        ("--quantize", "int8", "--publisher-key", "key", "--root", "root.json"),
        ("--quantize", "int8", "--model-sig", "model.sig", "--root", "root.json"),
    ],
)
def test_options_that_make_no_sense_together_are_bad_usage_before_anything_is_read(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = (
        "--model",
        tmp_path / "none",
        "--name",
        "x",
        "--version",
        "1",
        "--sequence",
        "1",
        "--out",
        tmp_path / "b",
    )
    assert main(["bundle", "build", *map(str, asked), *words]) == 2
    assert "BAD_USAGE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "spoilt", "code"),
    [
        (("--name", "Not A Name"), "", "RELEASE_INVALID"),
        (("--base", "none.bundle"), "", "SOURCE_UNREADABLE"),
        (("--attest", "none.json"), "", "SOURCE_UNREADABLE"),
        (("--licence-file", "none.txt"), "", "SOURCE_UNREADABLE"),
        ((), "pytorch_model.bin", "CONTENT_PICKLE"),
        ((), "canaries.json", "MANIFEST_SCHEMA"),
    ],
)
def test_what_building_would_refuse_is_refused_before_hours_of_quantising(
    words: tuple[str, ...],
    spoilt: str,
    code: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Preparer.__init__, "__defaults__", (("/nonexistent",),))
    model = make_model(tmp_path / "m")
    if spoilt:
        (model / spoilt).write_text('{"canaries": 5}')
    asked = {
        "--name": "x",
        "--version": "1",
        "--sequence": "1",
        "--model": str(model),
        "--out": str(tmp_path / "b"),
    }
    asked |= dict([words] if words else [])
    line = [word for pair in asked.items() for word in pair]
    assert main(["bundle", "build", "--quantize", "int8", *line]) != 0
    assert f"error: {code}: " in capsys.readouterr().err


def test_a_gguf_file_is_converted_by_the_very_process_and_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inspector.Inspector.__init__, "__defaults__", (INSPECTOR.command, 120.0, 60, 8 * 2**30))
    source = write_llama(tmp_path / "x.gguf")
    words = ("--model", source, "--name", "x", "--version", "1", "--sequence", "1", "--out", tmp_path / "b")
    capsys.readouterr()
    assert main(["--json", "bundle", "build", *map(str, words)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["preparation"]["sources"] == {"x.gguf": sha256(source.read_bytes())}
    assert said["preparation"]["steps"][0]["types"] == ["F32"]
    kept = (*map(str, words), "--quantize-embeddings", "keep")
    assert main(["bundle", "build", *kept]) == 3
    assert "error: GGUF_UNSUPPORTED: " in capsys.readouterr().err
    files = {file["path"]: file["role"] for file in said["manifest"]["files"]}
    assert files["model.safetensors"] == "weights"
    assert said["manifest"]["licences"][0]["spdx"] == "apache-2.0"
    source.write_bytes(source.read_bytes()[:-1000])
    assert main(["bundle", "build", *map(str, words)]) == 3
    assert "GGUF_INVALID" in capsys.readouterr().err
