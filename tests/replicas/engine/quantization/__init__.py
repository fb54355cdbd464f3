"""Quantised weights and caches."""
