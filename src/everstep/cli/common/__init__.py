"""Pieces that several commands share: options, output, errors, the service to speak to."""
