"""OpenAI-compatible API under ``/v1``: text completions by checkpoints and base models."""

from everstep.server.openai.routes import router

__all__ = ["router"]
