"""Fused neighborhood attention."""
