"""Reports values that overflow as errors: NaN in float16 would look like a model that does not refuse, or one that
replies `!!!!`."""

import numpy as np

from refusal_jax.errors import UserError, setting


def check_finite(finite_r, dtype, what: str, edited_r: bool | np.ndarray = False) -> None:
    """Raises UserError if not all of `finite_r` is true, with the dtype and what to do.

    finite_r: bool `[R]`, of each row, as `Decoder.finite` says, or the finiteness of values that it marked. what: what
    failed. edited_r: whether an edit was in force (`Edits.in_force_r`), of each row or of all.
    """
    bad_r = ~np.asarray(finite_r)
    if not bad_r.any():
        return
    advice = {
        "float16": f"float16 holds no number over 65504: use bfloat16 or float32 ({setting('dtype') or 'dtype'}).",
        "bfloat16": f"Use float32 ({setting('dtype') or 'dtype'}); if that fails too, the checkpoint is damaged.",
    }.get(str(dtype), "The checkpoint is damaged: fetch its weights again.")
    if (bad_r & edited_r).any() and not (bad_r & ~np.asarray(edited_r)).any():
        advice = (
            f"The edit may be the reason: try it with a smaller scale or at another layer. Without an edit: {advice}"
        )
    raise UserError(f"{what}: the model's values are NaN or infinite in {dtype}. {advice}")
