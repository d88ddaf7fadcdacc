"""The bundle's format: container, manifest, chunks, names. Reads bytes, trusts nobody."""
