"""Weights from the store: files by digest, every byte that is used hashed first; one file per format."""
