"""Imports what commands import, without the jobs, whose flags share names: once, by the process that copies itself for each
of them (see commands.py)."""

import gc
import importlib
import pkgutil

gc.disable()  # what is imported stays

import refusal_jax  # noqa: E402
from refusal_jax.jobs import main  # noqa: E402

main.prepare_environment("study")  # before JAX is imported, as in a command
for _module in pkgutil.walk_packages(refusal_jax.__path__, "refusal_jax."):
    if not _module.name.startswith(("refusal_jax.jobs", "refusal_jax.harness")):
        importlib.import_module(_module.name)

# What commands import once they work: a tokenizer comes with most of transformers, and with PyTorch where that is installed.
from refusal_jax.chat.model import demo_model_path  # noqa: E402
from refusal_jax.chat.prompts import Chat  # noqa: E402

Chat.load(demo_model_path(), 64)
for _name in ("scipy.stats",):
    importlib.import_module(_name)
gc.enable()
gc.freeze()
