"""Gradient training of the decoder, of all weights or of low-rank adapters."""
