"""Signed model bundles: their format, the trust that verifies them, and the importer that stores them."""
