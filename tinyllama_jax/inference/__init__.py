"""What a trained model is for: samples, scores, and the way to PyTorch."""
