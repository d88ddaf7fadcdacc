"""The control plane: who, may they, can they, where, at what cost, and the record of it. It never loads torch."""
