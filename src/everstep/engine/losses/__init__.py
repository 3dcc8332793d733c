"""Losses: built-in objectives and custom loss graphs."""
