"""What a recipe decides: its data, its schedule, its share of the work. Nothing is trained here."""

import dataclasses
import itertools
import json
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from tokenizers import Tokenizer

from benchmarks.demo_models import train
from benchmarks.demo_models.notes import Style
from benchmarks.demo_models.train import RECIPES, Course, batches, progress, rate_at, write_record

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


def test_a_training_that_was_stopped_is_taken_up_with_its_record(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.demo_models.train.update", lambda *_: (0.5, 1.0))
    monkeypatch.setattr("benchmarks.demo_models.train.optimizers", lambda *_: [])
    monkeypatch.setattr("benchmarks.demo_models.train.batches", lambda *_: itertools.repeat((ids, ids)))
    ids, network, kept = torch.zeros(2, 8), MagicMock(), []
    recipe = dataclasses.replace(FEW, minutes=0.0, steps=250)
    course = train.train(network, tokenizer, recipe, kept.append)
    assert kept == [Course(200, 200 * 16, 1.0)]  # what a kill now would leave
    write_record(recipe, kept[0], 2, tmp_path, None)
    stopped = json.loads((tmp_path / "training.json").read_text())
    write_record(dataclasses.replace(recipe, seed=9), course, 2, tmp_path, stopped)
    whole = json.loads((tmp_path / "training.json").read_text())
    assert (whole["steps"], whole["tokens"], whole["training_seed"]) == (450, 450 * 16, 9)
    assert whole["resumed_from"] == stopped


def test_only_the_answer_is_learned(tokenizer):
    ids, labels = next(batches(tokenizer, FEW))
    for row, label in zip(ids, labels, strict=True):
        said = tokenizer.decode(label[label != -100].tolist(), skip_special_tokens=True)
        assert said.startswith('{"')
        assert said.endswith("}")
        assert (label[label != -100] == row[label != -100]).all()
