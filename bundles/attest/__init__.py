"""Statements made when a bundle is built: where it comes from (SLSA) and what is in it (ML-BOM)."""
