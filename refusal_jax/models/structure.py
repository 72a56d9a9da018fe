"""The structure of a model's layers: which mixers each has, and where its weights and its memory stand among the others'.

Layers of any kinds in any order run through one scanned body, which picks a layer's mixers by index. What only some layers have
is stacked over these; a layer finds its own by its place among them.
"""

import bisect
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refusal_jax.models.config import ModelConfig
from refusal_jax.models.mixers.mixer import Mixer
from refusal_jax.models.weights import channel_of, mixers_of, names_apart, weight_table


@dataclasses.dataclass(frozen=True)
class Structure:
    """The kinds of mixers of a model, and which of them each layer has.

    mixers, channels: the kinds of sequence mixers and of channel mixers (`weights.channel_of`), None for none.
    mixer_l, channel_l: of each layer, an index into these. memory_l: of each layer, whose memory it uses: an index into
    `mixers`, or -1. memory_place_l: the place of its memory among that mixer's. sets: the sets of layers that alone have some
    weight. set_of: the index of that set, by the weight's name.
    """

    cfg: ModelConfig
    mixers: tuple[Mixer | None, ...]
    mixer_l: tuple[int, ...]
    channels: tuple[str | None, ...]
    channel_l: tuple[int, ...]
    memory_l: tuple[int, ...]
    memory_place_l: tuple[int, ...]
    sets: tuple[tuple[int, ...], ...]
    set_of: dict[str, int]

    @property
    def memories(self) -> tuple[int, ...]:
        """Returns the indices of the mixers that have a memory of their own."""
        return tuple(sorted({m for m in self.memory_l if m >= 0}))

    @property
    def source_l(self) -> tuple[int | None, ...]:
        """Returns the layer whose memory each layer uses, None where it has its own or none."""
        owners = {
            (m, p): l for l, (m, p) in enumerate(zip(self.memory_l, self.memory_place_l, strict=True)) if self.owns(l)
        }
        keys = zip(self.memory_l, self.memory_place_l, strict=True)
        return tuple(None if m < 0 or self.owns(l) else owners[m, p] for l, (m, p) in enumerate(keys))

    def kinds(self, mixer: int) -> tuple[int, ...]:
        """Returns the kinds of attention (indices into `ModelConfig.kinds`) of the layers that have a mixer, sorted."""
        pairs = zip(self.cfg.layer_kinds, self.mixer_l, strict=True)
        return tuple(sorted({kind for kind, index in pairs if index == mixer}))

    def owns(self, layer: int) -> bool:
        """Returns whether a layer has a memory of its own."""
        return self.memory_l[layer] == self.mixer_l[layer]

    @property
    def shares(self) -> bool:
        """Returns whether any layer uses the memory of another."""
        return any(source is not None for source in self.source_l)

    @property
    def taken(self) -> dict[str, tuple[float, ...]]:
        """Returns which part of the layers has each mixer and each channel mixer, by the name that the choice of it has in
        compiled programs."""
        of = {"mixer": (self.mixer_l, len(self.mixers)), "channel": (self.channel_l, len(self.channels))}
        return {name: tuple(l.count(i) / len(l) for i in range(count)) for name, (l, count) in of.items()}

    @property
    def places_lg(self) -> np.ndarray:
        """Returns the place of each layer in each of `sets`, int32 `[L, G]`; where it is not in it, some place."""
        places = [
            [min(bisect.bisect_left(layers, l), len(layers) - 1) for layers in self.sets]
            for l in range(len(self.mixer_l))
        ]
        return np.asarray(places, np.int32).reshape(len(self.mixer_l), len(self.sets))

    @property
    def places_lm(self) -> np.ndarray:
        """Returns the place of each layer in the memory of each of `memories`, int32 `[L, M]`; where it has none, some place."""
        counts = {m: [l for l in range(len(self.mixer_l)) if self.mixer_l[l] == m] for m in self.memories}

        def place(l: int, m: int) -> int:
            own = self.memory_l[l] == m
            return self.memory_place_l[l] if own else min(bisect.bisect_left(counts[m], l), len(counts[m]) - 1)

        places = [[place(l, m) for m in self.memories] for l in range(len(self.mixer_l))]
        return np.asarray(places, np.int32).reshape(len(self.mixer_l), len(self.memories))

    def empty(self, rows: int, tokens: int, dtype) -> Any:
        """Returns the memory of rows that have not begun, all zeros, with room for so many tokens: a tuple that has for each of
        `memories` a pytree of `Tokens` and `State`, stacked over its layers."""
        one = {m: self._mixer(m).memory(self.cfg, rows, tokens, dtype) for m in self.memories}
        counts = [self.mixer_l.count(m) for m in self.memories]
        return tuple(
            jax.tree.map(lambda a, count=count: jnp.zeros((count, *a.shape), a.dtype), one[m])
            for m, count in zip(self.memories, counts, strict=True)
        )

    def _mixer(self, index: int) -> Mixer:
        mixer = self.mixers[index]
        assert mixer is not None
        return mixer


@functools.cache
def structure(cfg: ModelConfig) -> Structure:
    """Returns the structure of a model's layers."""
    mixers, mixer_l = mixers_of(cfg), cfg.layer_mixers or (0,) * cfg.n_layers
    channel_names = [channel_of(cfg, layer) for layer in range(cfg.n_layers)]
    channels = tuple(dict.fromkeys(channel_names))
    memory_l, place_l, seen = [], [], dict.fromkeys(range(len(mixers)), 0)
    for index in mixer_l:
        mixer = mixers[index]
        whose = -1 if mixer is None else index if mixer.reads is None else mixer.reads
        memory_l.append(whose)
        place_l.append(seen[whose] - (whose != index) if whose >= 0 else 0)
        seen[index] += 1
    table, apart = weight_table(cfg), sorted(names_apart(cfg))
    sets = tuple(dict.fromkeys(table[f"blocks.{name}"].layers for name in apart))
    set_of = {name: sets.index(table[f"blocks.{name}"].layers) for name in apart}
    channel_l = tuple(map(channels.index, channel_names))
    return Structure(cfg, mixers, mixer_l, channels, channel_l, tuple(memory_l), tuple(place_l), sets, set_of)
