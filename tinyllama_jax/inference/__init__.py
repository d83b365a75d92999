"""New text from a trained model."""
