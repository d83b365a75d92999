"""From text to datasets."""
