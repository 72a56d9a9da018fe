"""Organisms: checkpoints whose history is known, because they are made from a base by recipes, for trying detectors on."""
