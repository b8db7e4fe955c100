"""Whole networks: speed and memory."""
