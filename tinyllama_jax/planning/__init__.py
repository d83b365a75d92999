"""Plans runs on GPUs that are not here: their memory, network, time and cost."""
