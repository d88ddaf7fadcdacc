"""Synthetic regulated-industry notes with their gold JSON: pure Python, seeded, endless."""

from benchmarks.demo_models.notes.generate import DOMAINS, KEYS, SPLITS, Note, draw, instructions, stream
from benchmarks.demo_models.notes.scoring import FieldScores, score

__all__ = ["DOMAINS", "KEYS", "SPLITS", "FieldScores", "Note", "draw", "instructions", "score", "stream"]
