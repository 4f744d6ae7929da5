"""Conversion of a trained model to merged weights, GGUF and Ollama files."""
