"""Tests of the op backends."""
