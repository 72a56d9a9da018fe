"""Writes results of resistance tests as text, JSON and a page."""
