"""How much of what is computed of a study's prompts is padding: `python tests/padding_waste.py`.

  JAX_PLATFORMS=cpu python tests/padding_waste.py [MODEL] [--prompts FOLDER] [--parameters N] [--shared N]

MODEL is a checkpoint or a GGUF file, whose tokenizer is used and whose size decides how many lengths are worth their
compilation; by default the embedded one, which --parameters lets pass for another size. FOLDER holds the six sets as
harmful_train.json and so on; by default the bundled ones. Batches are those of a study on a CPU, all prompts kept. Of
each stage this prints what padding to the next usual length computed, each batch by itself, and what lengths do that
are chosen from the stage's prompts: lengths, rows × tokens, the share that is no token of a prompt, and the share that
is padding alone, without rows that only fill a batch. --shared tokens that the template writes before all prompts are left out
of the forward passes, where they are computed once.
For loss, the next prompts of the set stand in for replies, 1 to 16 of them.
"""

import argparse
import dataclasses
import math

import numpy as np

from refusal_jax.chat.loss_rows import chat_rows
from refusal_jax.chat.model import demo_model_path
from refusal_jax.chat.padding import CPU, Padding, Prices, alike, bucket, halves
from refusal_jax.chat.prompts import Chat
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.data.sampling import SPLITS, sample_prompts
from refusal_jax.models.hf_config import load_config
from refusal_jax.plan.limits import parameters
from refusal_jax.plan.planner import ON_CPU
from refusal_jax.study.config import get_config
from refusal_jax.study.scoring import PROGRAMS, Batching


def row(title: str, sets: list[list[int]], rows: int, lengths: list[int], parts: list[list[list[int]]]) -> str:
    """Returns a line of the table. parts: the batches of each set, as numbers of tokens."""
    tokens = sum(map(sum, sets))
    batches = [(part, min(n for n in lengths if n >= max(part))) for of_set in parts for part in of_set]
    whole = rows * sum(length for _, length in batches)
    alone = sum(len(part) * length for part, length in batches)
    shown = " ".join(map(str, lengths))
    return f"{title:<22}{rows:>5}  {shown:<28}{whole:>8}{1 - tokens / whole:>8.1%}{1 - tokens / alone:>8.1%}"


def compare(title: str, whole: list[list[int]], rows: int, shapes: Padding, skip: int = 0) -> None:
    """Prints what a stage's sets of prompts took and take, without the first `skip` tokens of each."""
    sets = [[n - skip for n in of_set] for of_set in whole]
    shapes = Padding(shapes.rows, tuple(n - skip for n in shapes.lengths))
    parts = [[sorted(of_set)[i : i + rows] for i in range(0, len(of_set), rows)] for of_set in sets]
    usual = sorted({bucket(max(part)) for of_set in parts for part in of_set})
    print(row(title, sets, rows, usual, parts))
    parts = [[[of_set[i] for i in part] for part in alike(of_set, shapes.rows)] for of_set in sets]
    print(row("", sets, shapes.rows, list(shapes.lengths), parts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--prompts", default="")
    for name in ("parameters", "shared"):
        parser.add_argument(f"--{name}", type=float, default=0)
    asked = parser.parse_args()
    folder = checkpoint_folder(asked.model) if asked.model else demo_model_path()
    cfg, config = load_config(folder), get_config()
    chat = Chat.load(folder, cfg.context_length, cfg.vocab_size)
    for split in SPLITS if asked.prompts else ():
        config.data[split] = f"{asked.prompts}/{split}.json"
    texts = {split: [one["instruction"] for one in rows] for split, rows in sample_prompts(config.data).items()}
    lengths = {split: [len(chat.prompt_ids(text)) for text in of_split] for split, of_split in texts.items()}
    size = asked.parameters or parameters(cfg)
    prices = Prices(CPU[0] / (2 * size), CPU[1], cfg.context_length)
    print(f"{size / 1e6:.1f}M parameters, compiling a program is worth {prices.program:,.0f} tokens")
    print(f"{'':<22}{'rows':>5}  {'lengths':<28}{'tokens':>8}{'waste':>8}{'padding':>8}")

    skip = int(asked.shared)
    shapes = Padding.of(lengths.values(), list(halves(ON_CPU.forward, 1)), prices)
    compare("extraction", [lengths[split] for split in SPLITS[:4]], ON_CPU.forward, shapes, skip)
    compare("all prompts", list(lengths.values()), ON_CPU.forward, shapes)
    val = [lengths[split] for split in SPLITS[2:4]]
    times = 0.5 * len(chat.post_instruction_ids) * math.floor(0.8 * cfg.n_layers)
    program = dataclasses.replace(prices, batch=0, program=PROGRAMS * prices.program)
    n, positions = max(map(len, val)), len(chat.post_instruction_ids)
    computed = {size: Batching.of(ON_CPU.select, n, size).scored(positions) for size in halves(ON_CPU.select, 1)}
    sizes = [size for size, scored in computed.items() if scored <= computed[ON_CPU.select]]
    compare("selection", val, ON_CPU.select, Padding.of(val, sizes, program, times), skip)
    said = [" ".join(np.roll(texts["harmless_test"], -i)[1 : 2 + i % 16]) for i in range(len(texts["harmless_test"]))]
    answers = chat_rows(chat, list(zip(texts["harmless_test"], said, strict=True)), cfg.context_length)
    rows = [[len(row.ids) for row in answers]]
    compare("loss", rows, ON_CPU.loss, Padding.of(rows, [ON_CPU.loss], prices, 3))


if __name__ == "__main__":
    main()
