"""The demonstration that ./install.sh --demo runs, and the model it shows."""
