"""What quantising costs on the demo's task: its canaries served, and fields counted as the cards count them."""

import json
from pathlib import Path

import pytest

from benchmarks.demo_models.notes import draw
from engine.prepare.folder import ModelFolder
from engine.prepare.quantising import quantise_folder
from engine.prepare.question import Settings
from engine.text.template import Message
from tests.engine.tiny import engine, request, run

DEMO = Path(__file__).parents[2] / "demo" / "demo-notes-s"
SPLITS = ("unseen_values", "unseen_templates")
MOST_LOST = {"int8": 0.002, "int4 g32": 0.005, "int4 g128": 0.005}


def test_a_demo_model_in_int4_is_served_in_bfloat16_and_answers_its_canaries_as_before(tmp_path: Path) -> None:
    notes = [[*note.messages, {"role": "assistant", "content": note.answer}] for note in draw(3000, 32, "train")]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps({"messages": note}) + "\n" for note in notes))
    (tmp_path / "out").mkdir()
    settings = Settings(4, 128, False, tmp_path / "notes.jsonl", 4096, 1)
    quantise_folder(DEMO, tmp_path / "out", settings, lambda stage, done, total: None)
    text, loop = ModelFolder(DEMO).text(), engine(tmp_path / "out", dtype="bfloat16")
    canaries = json.loads((DEMO / "canaries.json").read_text())["canaries"]
    for i, canary in enumerate(canaries):
        asked = text.from_conversation([Message(**message) for message in canary["messages"]])
        loop.submit(request(i, asked, max_tokens=160))
    answers = run(loop)
    assert [answers[i].text for i in range(len(canaries))] == [canary["expected"] for canary in canaries]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_int8_loses_at_most_a_fifth_of_a_point_and_int4_half_a_point_of_the_demo_s_fields(tmp_path: Path) -> None:
    from benchmarks.demo_models.evaluate import COUNT
    from benchmarks.demo_models.quantised import fields_right, load, quantised, write_calibration

    calibration = tmp_path / "notes.jsonl"
    write_calibration(calibration, wide=False)
    plain = fields_right(load(DEMO), False, SPLITS, COUNT)
    for way, most in MOST_LOST.items():
        found = quantised(DEMO, way, calibration, False, SPLITS, COUNT)
        for split in SPLITS:
            assert found.tallies[split].share() >= plain[split].share() - most
        assert found.error <= found.rounded
        assert found.after < found.before * 1.001
