"""Greedy generation: prompts are admitted to the rows of a batch, and all rows are decoded together in one jitted loop.

A row whose reply has ended is free for another prompt, so that a few long replies do not hold the batch.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from refusal_jax.axes import Leaf
from refusal_jax.edits import Edits
from refusal_jax.models.cache import Cache, placed
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.decoding import Decoding
from refusal_jax.models.prefix import joined, picked
from refusal_jax.models.sharding import RULES, constrain, replicate
from refusal_jax.models.structure import structure
from refusal_jax.taps import NO_TAPS, Taps

READ = Taps(("resid_pre",), last=1)  # of replies with a probe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """The state of replies in the making, one a row; `cache` and `edits` are None while a jitted function takes it apart."""

    cache: Any  # a `Cache`
    edits: Any  # `Edits` of the rows, in the form of `Edits.for_batch`
    token_b: Leaf  # int32 [B], each row's newest token, which the cache does not hold yet
    count_b: Leaf  # int32 [B], tokens of the reply so far
    active_b: Leaf  # bool [B], whether the reply goes on
    out_bo: Leaf  # int32 [B, O], the replies, padded
    finite_b: Leaf  # bool [B], whether all that the reply was chosen by is finite; a row that is not has ended
    prompt_bt: Leaf | None = None  # int32 [B, T], the prompts' tokens, -1 for padding, if decoding looks at them
    probe_bd: Leaf | None = None  # float32 [B, D], unit directions that tokens are projected on, if wanted
    # float32 [B, L, 1 + O]: projections at block inputs, of the prompt's last token and then the reply's; NaN where a
    # token has not been read
    along_blo: Leaf | None = None

    def placed(self, mesh) -> "Generation":
        """Returns the state, inside a jitted function, with every array placed by its axes: programs can then hand it on."""
        memory = placed(mesh, self.cache.memory, layers=True, decoding=True)
        rest = jax.tree.map(lambda a: constrain(mesh, a, *["batch"][: a.ndim]), dataclasses.replace(self, cache=None))
        small = jax.tree.map(
            lambda a: constrain(mesh, a, *["batch"][: a.ndim]), dataclasses.replace(self.cache, memory=None)
        )
        return dataclasses.replace(rest, cache=dataclasses.replace(small, memory=memory))

    def chosen(self, decoder: Decoder, x_btd, eos_ids: tuple[int, ...], decoding: Decoding | None) -> "Generation":
        """Returns the state with one more token in every active row, the most probable by the last residual in `x_btd`."""
        logits_bv, finite_b = decoder.next_logits(x_btd)
        if decoding is not None:
            assert self.prompt_bt is not None, "decoding looks at prompts: make the state with remembered=True"
            logits_bv = decoding.applied(logits_bv, self.prompt_bt, self.out_bo, self.count_b)
        token_b = constrain(decoder.mesh, jnp.argmax(logits_bv, axis=-1).astype(jnp.int32), "batch")
        finite_b = constrain(decoder.mesh, self.finite_b & (finite_b | ~self.active_b), "batch")
        return dataclasses.replace(self, finite_b=finite_b).written(token_b, eos_ids)

    def written(self, token_b: jax.Array, eos_ids: tuple[int, ...]) -> "Generation":
        """Returns the state with one more token in every active row; a row ends with an end token, when it is full or no longer
        finite."""
        n = self.out_bo.shape[1]
        here_bo = self.active_b[:, None] & (jnp.arange(n) == self.count_b[:, None])
        count_b = self.count_b + self.active_b
        return dataclasses.replace(
            self,
            token_b=token_b,
            count_b=count_b,
            active_b=self.active_b & self.finite_b & (count_b < n) & ~jnp.isin(token_b, jnp.asarray(eos_ids)),
            out_bo=jnp.where(here_bo, token_b[:, None], self.out_bo),
        )

    def read(self, tapped, probe_bd) -> "Generation":
        """Returns the state with the projections of every active row's newest token (the prompt's last, where there is no reply
        yet); tapped: the taps of READ."""
        if probe_bd is None or self.along_blo is None:
            return self
        resid_bld = tapped["resid_pre"][:, :, 0].swapaxes(0, 1).astype(jnp.float32)
        along_bl = jnp.einsum("bld,bd->bl", resid_bld, probe_bd, precision="highest")
        here_bo = self.active_b[:, None] & (jnp.arange(self.along_blo.shape[2]) == self.count_b[:, None])
        return dataclasses.replace(self, along_blo=jnp.where(here_bo[:, None], along_bl[..., None], self.along_blo))


def admitted_rows(rows: int, mesh) -> int:
    """Returns the number of prompts that are admitted together to `rows` rows: a quarter, rounded up to a multiple of the
    ways in which the mesh divides a batch."""
    ways = math.prod(mesh.shape[name] for name in RULES["batch"]) if mesh else 1
    return min(-(-max(rows // 4, 1) // ways) * ways, rows)


# The decoder's arrays are kept, though unused: they say on which devices the state is.
@partial(
    jax.jit,
    static_argnames=("rows", "length", "max_new_tokens", "pad_id", "directions", "probed", "remembered"),
    keep_unused=True,
)
def empty(
    decoder: Decoder,
    *,
    rows: int,
    length: int,
    max_new_tokens: int,
    pad_id: int,
    directions: int = 1,
    probed: bool = False,
    remembered: bool = False,
) -> Generation:
    """Returns `rows` rows that write nothing, for prompts padded to `length` tokens and replies of at most `max_new_tokens`.

    directions: how many the edits of a row may ablate together. probed: whether the prompts come with directions to project their
    tokens on. remembered: whether the prompts' tokens are kept, as decoding needs that is not plain.
    """
    cfg, slots = decoder.cfg, length + max_new_tokens
    memory = structure(cfg).empty(rows, slots, decoder.dtype)
    none_b = jnp.zeros(rows, jnp.int32)
    edits = jax.tree.map(jnp.asarray, Edits.none(cfg.d_model).for_batch(rows, cfg.n_layers, cfg.d_model))
    return Generation(
        Cache(memory, jnp.zeros((rows, slots), bool), jnp.int32(length), none_b),
        dataclasses.replace(edits, ablate_rjd=jnp.zeros((rows, directions, cfg.d_model), jnp.float32)),
        none_b,
        none_b,
        jnp.zeros(rows, bool),
        jnp.full((rows, max_new_tokens), pad_id, jnp.int32),
        jnp.ones(rows, bool),
        jnp.full((rows, length), -1, jnp.int32) if remembered else None,
        jnp.zeros((rows, cfg.d_model), jnp.float32) if probed else None,
        jnp.full((rows, cfg.n_layers, 1 + max_new_tokens), jnp.nan, jnp.float32) if probed else None,
    ).placed(decoder.mesh)


@partial(jax.jit, static_argnames=("eos_ids", "pad_id"), donate_argnames="state")
def admit(
    decoder: Decoder,
    state: Generation,
    tokens_rt,
    mask_rt,
    edits: Edits,
    source_b,
    probe_rd=None,
    decoding: Decoding | None = None,
    before: Cache | None = None,
    before_r: jax.Array | None = None,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Generation:
    """Reads R prompts, picks the first token of their replies, and gives them rows of the batch.

    source_b: int32 `[B]`, which of the R prompts row b takes, -1 for a row that goes on with what it has. Prompts are padded
    to the length that `state` was made for. probe_rd: of `Generation`, if `state` was made for one. decoding:
    what replies are chosen by besides their probability, if `state` was made to remember prompts. before: the memory of the
    tokens that all prompts begin with, a row for each edit, and before_r: int32 `[R]`, which of its rows each prompt goes on
    from; None where all tokens are to be read.
    """
    taps, own, rest_rt, rest_mask_rt = NO_TAPS if probe_rd is None else READ, None, tokens_rt, mask_rt
    if before is not None and before_r is not None:
        own, count = picked(decoder.mesh, before, before_r), before.slots
        rest_rt, rest_mask_rt = tokens_rt[:, count:], mask_rt[:, :-count]
    read = decoder.forward(rest_rt, rest_mask_rt, edits, taps, own, keep=True)
    memory = read.memory if own is None else joined(own, read.memory, mask_rt)
    rows = len(tokens_rt)
    none_r, along = jnp.zeros(rows, jnp.int32), None
    if probe_rd is not None and state.along_blo is not None:
        along = jnp.full((rows, *state.along_blo.shape[1:]), jnp.nan, jnp.float32)
    fresh = Generation(
        Cache.of_prompt(memory, mask_rt, state.cache.slots, state.cache.filled),
        edits,
        none_r,
        none_r,
        jnp.ones(rows, bool),
        jnp.full((rows, state.out_bo.shape[1]), pad_id, jnp.int32),
        jnp.ones(rows, bool),
        None if state.prompt_bt is None else jnp.where(mask_rt, tokens_rt, -1),
        probe_rd,
        along,
    )
    fresh = fresh.read(read.taps, probe_rd).chosen(decoder, read.resid_btd, eos_ids, decoding)
    return _merged(state, fresh, source_b).placed(decoder.mesh)


def _merged(state: Generation, fresh: Generation, source_b) -> Generation:
    """Returns `state` with row `source_b[b]` of `fresh` in row b, unless that is -1."""
    taken_b = source_b >= 0

    def merge(old, new):
        where = taken_b.reshape(-1, *(1,) * (old.ndim - 1))
        return jnp.where(where, jnp.take(new, source_b, axis=0, mode="clip"), old)

    def merge_layers(old, new):
        """Merges one layer at a time: gathering all of them at once would take as much memory as the cache."""

        def layer(index, whole):
            here, fresh = (jax.lax.dynamic_index_in_dim(a, index, keepdims=False) for a in (whole, new))
            return jax.lax.dynamic_update_index_in_dim(whole, merge(here, fresh), index, 0)

        return jax.lax.fori_loop(0, len(old), layer, old)

    memory = jax.tree.map(merge_layers, state.cache.memory, fresh.cache.memory)
    rows = (
        dataclasses.replace(s, cache=dataclasses.replace(s.cache, memory=None, filled=None)) for s in (state, fresh)
    )
    rest = jax.tree.map(merge, *rows)
    return dataclasses.replace(rest, cache=dataclasses.replace(rest.cache, memory=memory, filled=state.cache.filled))


@partial(jax.jit, static_argnames="eos_ids", donate_argnames="state")
def decode(
    decoder: Decoder,
    state: Generation,
    least_active,
    most_steps,
    decoding: Decoding | None = None,
    *,
    eos_ids: tuple[int, ...],
):
    """Decodes until fewer than `least_active` rows are active, or for `most_steps` steps; both are traced integers.

    decoding: as in `admit`. Returns the state, and for the host, on every device, its `active_b`, `out_bo`, `count_b`
    and `finite_b`. The cache is donated and changed in place. Edits apply to generated tokens as to the prompt's.
    """
    one = jnp.ones((len(state.token_b), 1), bool)
    edits, probe_bd, prompt_bt = state.edits, state.probe_bd, state.prompt_bt
    taps = NO_TAPS if probe_bd is None else READ

    def going(carry):
        step, state = carry
        return (step < most_steps) & (jnp.sum(state.active_b) >= least_active)

    def step(carry):
        step, state = carry
        cache = state.cache
        out = decoder.forward(state.token_b[:, None], one, edits, taps, cache)
        state = dataclasses.replace(
            state.read(out.taps, probe_bd), cache=cache.append(out.memory, one), prompt_bt=prompt_bt
        )
        state = state.chosen(decoder, out.resid_btd, eos_ids, decoding)
        return step + 1, dataclasses.replace(state, prompt_bt=None)

    constant = dict.fromkeys(("edits", "probe_bd", "prompt_bt"))
    _, state = jax.lax.while_loop(going, step, (jnp.int32(0), dataclasses.replace(state, **constant)))
    state = dataclasses.replace(state, edits=edits, probe_bd=probe_bd, prompt_bt=prompt_bt).placed(decoder.mesh)
    return state, *replicate(decoder.mesh, (state.active_b, state.out_bo, state.count_b, state.finite_b))
