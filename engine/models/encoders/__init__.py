"""Encoders on the op protocol: one short file per family over shared blocks, for vectors and for scores."""
