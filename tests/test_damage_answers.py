"""What answers cost under edits: sums against PyTorch hooks and NumPy, files of questions, intervals."""

import numpy as np
import torch
from oracle import ablation, hooked

from refusal_jax import Edits
from refusal_jax.chat.loss_rows import LossRow, chat_rows
from refusal_jax.damage.edited_rows import EditedRows

PAIRS = [
    ("How do I bake the bread?", "Sure, here is how to do it."),
    ("How do I rob the cake?", "I cannot help with that."),
    ("Bake?", "Sure, here is how to do it. " * 4),
]


def test_sums_of_answers_equal_torch_hooks(model, hf):
    """Cross-entropy and KL of each answer under each edit, of which several go together, padding and all."""
    rng = np.random.default_rng(3)
    direction, doses = rng.normal(size=model.config.d_model), (0.0, 0.7, 1.0)
    edits = Edits.concat([Edits.ablate(direction, scale=dose) for dose in doses])
    rows = [*chat_rows(model.chat, PAIRS, 256), LossRow([3, 4], 2)]
    read = EditedRows.build(model, rows, 16)
    assert read.at_once == 2 and read.tokens_n.tolist()[-1] == 0
    losses_mn, kl_mn = read.losses(edits), read.divergences(edits)
    for number, dose in enumerate(doses):
        hooks = [
            (module, at, lambda x, edit=edit, dose=dose: x + dose * (edit(x) - x))
            for module, at, edit in ablation(hf.model.layers, direction)
        ]
        for place, row in enumerate(rows[:-1]):
            ids = torch.tensor([row.ids])
            with torch.no_grad():
                base = torch.log_softmax(hf(ids).logits[0].double(), -1)
                with hooked(hooks):
                    logp = torch.log_softmax(hf(ids).logits[0].double(), -1)
            at = range(row.first, len(row.ids))
            want = -sum(float(logp[i - 1, row.ids[i]]) for i in at)
            moved = sum(float((base[i - 1].exp() * (base[i - 1] - logp[i - 1])).sum()) for i in at)
            np.testing.assert_allclose([losses_mn[number, place], kl_mn[number, place]], [want, moved], atol=2e-3)
            assert read.tokens_n[place] == len(row.ids) - row.first
    assert (losses_mn[:, -1] == 0).all() and np.abs(kl_mn[0]).max() < 1e-5 < kl_mn[1, :-1].min()
