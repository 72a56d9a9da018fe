"""Measures what removing a direction costs, at every strength and place."""
