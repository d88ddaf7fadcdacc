"""Measurements and recipes that ship beside the appliance, outside its wheels."""
