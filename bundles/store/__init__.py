"""The model store: files by digest, records by model name, and a staging area whose content nobody believes."""
