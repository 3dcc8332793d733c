"""The OpenAI-compatible surface under ``/v1``: texts completed by checkpoints and base models."""

from everstep.server.openai.routes import router

__all__ = ["router"]
