"""Measures how good a model is: its held-out loss, and task scores beside published ones."""
