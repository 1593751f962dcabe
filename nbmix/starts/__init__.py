"""Starts, one small object each, chosen by the config group ``start``."""
