"""Base models: loading, LoRA projections, attention, the built-in pico model."""
