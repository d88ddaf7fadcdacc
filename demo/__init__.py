"""The demonstration that ./install.sh --demo runs, and the models it shows."""
