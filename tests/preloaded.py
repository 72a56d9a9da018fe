"""Imports what commands import, without the jobs, whose flags share names: once, by the process that copies itself for each
of them (see commands.py)."""

import gc
import importlib
import pkgutil

import refusal_jax
from refusal_jax.jobs import main

main.prepare_environment("study")  # before JAX is imported, as in a command
for _module in pkgutil.walk_packages(refusal_jax.__path__, "refusal_jax."):
    if not _module.name.startswith(("refusal_jax.jobs", "refusal_jax.harness")):
        importlib.import_module(_module.name)
gc.freeze()
