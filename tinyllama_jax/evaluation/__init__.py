"""How good a model is: held-out loss, tasks and published scores."""
