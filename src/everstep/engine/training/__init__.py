"""Layers of training: Llama-like families without the modules of transformers."""
