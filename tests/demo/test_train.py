"""What a recipe decides: its data, its schedule, its share of the work. Nothing is trained here."""

import dataclasses
import itertools
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmarks.demo_models import train
from benchmarks.demo_models.notes import Style
from benchmarks.demo_models.train import RECIPES, batches, progress, rate_at

DEMO = Path(__file__).parents[2] / "demo"
FEW = dataclasses.replace(RECIPES["m"], rows=4)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(DEMO / "demo-notes-s" / "tokenizer.json"))


def test_the_small_model_is_made_of_the_first_wording_as_it_ever_was():
    assert RECIPES["s"].style == Style(invented=0.6)
    assert RECIPES["m"].style.wide


def test_a_schedule_is_counted_in_steps_or_in_minutes():
    assert [progress(step, 9.0, RECIPES["s"]) for step in (0, 100, 1250, 2400)] == [0, 0, 0.5, 1]
    assert [progress(5, minutes, FEW) for minutes in (0, FEW.minutes / 2, FEW.minutes + 1)] == [0, 0.5, 1]


def test_the_learning_rate_warms_up_and_falls_to_a_fiftieth():
    rates = [rate_at(step, step / 1000, FEW) for step in range(1001)]
    assert rates[0] == pytest.approx(1 / FEW.warmup)
    assert max(rates) > 0.99
    assert rates[-1] == pytest.approx(0.02)


def test_processes_that_train_together_share_each_batch(tokenizer, monkeypatch):
    def first(rank, world):
        monkeypatch.setattr(train, "place", lambda: (rank, world))
        return {
            tuple(row[row != 5].tolist()) for ids, _ in itertools.islice(batches(tokenizer, FEW), 3) for row in ids
        }

    left, right = first(0, 2), first(1, 2)
    assert len(left) == len(right) == 6
    assert left | right == first(0, 1)


def test_only_the_answer_is_learned(tokenizer):
    ids, labels = next(batches(tokenizer, FEW))
    for row, label in zip(ids, labels, strict=True):
        said = tokenizer.decode(label[label != -100].tolist(), skip_special_tokens=True)
        assert said.startswith('{"')
        assert said.endswith("}")
        assert (label[label != -100] == row[label != -100]).all()
