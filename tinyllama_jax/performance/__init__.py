"""What a compiled step is, and where its time goes."""
