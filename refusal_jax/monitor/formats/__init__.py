"""Reads the lines of logs, whatever tool wrote them, as drafts of traces."""
