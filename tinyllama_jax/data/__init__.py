"""From documents to the batch of a step."""
