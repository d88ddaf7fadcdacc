"""Judging a model's files: a signature says who vouches for bytes, not that they are safe to parse."""
