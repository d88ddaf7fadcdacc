"""The importer process: bundles in, committed model versions out. The store's one writer; no network, no torch."""
