"""From datasets to the batch of a step."""
