"""Reads what a compiled step does, predicts its time, and measures where the time goes."""
