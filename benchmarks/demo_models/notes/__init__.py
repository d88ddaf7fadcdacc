"""Synthetic regulated-industry notes with their gold JSON: pure Python, seeded, endless."""

from benchmarks.demo_models.notes.generate import DOMAINS, KEYS, SPLITS, Note, Style, draw, instructions, stream
from benchmarks.demo_models.notes.scoring import FieldScores, score
from benchmarks.demo_models.notes.variety import Variety

__all__ = [
    "DOMAINS",
    "KEYS",
    "SPLITS",
    "FieldScores",
    "Note",
    "Style",
    "Variety",
    "draw",
    "instructions",
    "score",
    "stream",
]
