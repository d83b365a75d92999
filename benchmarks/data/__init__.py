"""Preparing corpora beside bare sentencepiece, and reading the datasets that come of it."""
