"""Measurements of Vision Remember."""
