"""What a run takes of GPUs that are not here."""
