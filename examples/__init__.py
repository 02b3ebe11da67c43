"""Runnable examples of Vision Remember."""
