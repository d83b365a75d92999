"""The Llama 2 decoder."""
