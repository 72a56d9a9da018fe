"""TPU chips, and the slices of them by name.

Sizes are Google Cloud's: `v5e-16` and `v6e-16` count chips, `v4-16`, `v5p-16` and `tpu7x-16` count TensorCores, two a chip, as
in `gcloud`. Peaks are from the Cloud TPU documentation; clocks convert the compiler's cycles to seconds.
"""

import dataclasses
import math
import re

from refusal_jax.errors import UserError, did_you_mean, setting


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of TPUs, by what JAX calls a device: a chip, but of tpu7x each of a chip's two halves.

    hbm: usable bytes of memory of a device. bandwidth: of that memory, bytes/s. flops: bfloat16 peak, 1/s. link: bytes/s of one
    ICI link in one direction. axes: number of axes of the torus. cores: TensorCores that a slice's name counts for each chip.
    hertz: clock of a core. ring: an axis of that length or more wraps around. kinds: JAX's names of its devices. devices: of a
    chip, which share its links. reached: shares of
    the peak and of the bandwidth that compiled forward passes and decoding come to, by the compiler's cycles.
    """

    name: str
    hbm: float
    bandwidth: float
    flops: float
    link: float
    axes: int
    cores: int
    hertz: float
    ring: int
    kinds: tuple[str, ...]
    devices: int = 1
    reached: tuple[float, float] = (0.6, 0.5)

    def links(self, shape: tuple[int, ...]) -> float:
        """Returns the bytes/s that a device of a slice of this shape can send, along all axes together."""
        sides = [2 if size >= self.ring else 1 for size in shape if size > 1]
        return self.link * max(sum(sides), 1) / self.devices


GIB = float(2**30)
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 30.75 * GIB, 1.2e12, 275e12, 45e9, 3, 2, 1.05e9, 4, ("TPU v4",)),
        Chip(
            "v5e", 15.75 * GIB, 8.1e11, 197e12, 45e9, 2, 1, 1.5e9, 16, ("TPU v5 lite", "TPU v5e"), reached=(0.74, 0.52)
        ),
        Chip("v5p", 95.74 * GIB, 2.765e12, 459e12, 90e9, 3, 2, 1.75e9, 4, ("TPU v5", "TPU v5p"), reached=(0.6, 0.3)),
        Chip(
            "v6e",
            31.25 * GIB,
            1.638e12,
            918e12,
            90e9,
            2,
            1,
            1.75e9,
            16,
            ("TPU v6 lite", "TPU v6e"),
            reached=(0.45, 0.58),
        ),
        # Its clock is not published: its peak needs this one, if a core does as much in a cycle as v6e's.
        Chip("tpu7x", 94.74 * GIB, 3.69e12, 1153.5e12, 90e9, 3, 2, 2.2e9, 4, ("TPU7x",), 2, (0.39, 0.35)),
    )
}
SHAPES = {  # chips -> how they are laid out in a slice of that size
    2: {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)},
    3: {
        4: (2, 2, 1),
        8: (2, 2, 2),
        16: (2, 2, 4),
        32: (2, 4, 4),
        64: (4, 4, 4),
        128: (4, 4, 8),
        256: (4, 8, 8),
        512: (8, 8, 8),
    },
}
DCN = 12.5e9  # bytes/s of a host's network between slices


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips to rent: `slices` slices of `shape`."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, text: str) -> "Slice":
        """Parses a name such as v5e-16, tpu7x-16, 2xv5e-16 (two slices), or a chip and a shape such as v5e:4x4.

        Raises UserError, which lists the valid names, for any other.
        """
        match = re.fullmatch(
            r"(?:([1-9]\d*)x)?(tpu7x|v\w+?)(?:-(\d+)|:(\d+(?:x\d+){1,2}))", text.strip().lower().replace("litepod", "e")
        )
        chip = CHIPS.get(match[2]) if match else None
        if match is None or chip is None:
            raise UserError(
                f"{setting('topology', text)} is no TPU slice that can be planned for. "
                f"Name one as gcloud does "
                f"({', '.join(names())}), several as 2xv5e-16, or give the shape as in v5e:4x4.{did_you_mean(text, names())}"
            )
        if match[4]:
            shape = tuple(map(int, match[4].split("x")))
        else:
            count, rest = divmod(int(match[3]), chip.cores)
            shape = SHAPES[chip.axes].get(count if not rest else 0)
        if shape is None or len(shape) != chip.axes or math.prod(shape) not in SHAPES[chip.axes]:
            raise UserError(f"There is no {text}. Slices of {chip.name} are {', '.join(names(chip))}.")
        return cls(chip, shape, int(match[1] or 1))

    @property
    def chips(self) -> int:
        """Returns the number of chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def size(self) -> int:
        """Returns the number of JAX's devices of all slices, which a mesh has."""
        return self.chips * self.chip.devices

    @property
    def name(self) -> str:
        """Returns the name as gcloud spells it."""
        return (
            f"{f'{self.slices}x' if self.slices > 1 else ''}{self.chip.name}-{math.prod(self.shape) * self.chip.cores}"
        )

    def devices(self) -> list:
        """Returns stand-ins for the slice's devices, to compile for. Raises UserError without libtpu."""
        from jax.experimental import topologies

        settings: dict[str, int | str] = {"num_slices": self.slices} if self.slices > 1 else {}
        if self.chip.name == "v4":
            settings["chip_config_name"] = "megacore"
        name = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        try:
            return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **settings).devices)
        except Exception as error:  # jax raises many types, all of which mean that there is no compiler for it
            raise UserError(
                f"There is no TPU compiler for {name} here ({' '.join(str(error).split())[:200]}). Install it with "
                "pip install 'refusal-jax[plan]'."
            ) from None


def names(chip: Chip | None = None) -> list[str]:
    """Returns the names of the slices of one chip, or of all chips."""
    chips = [chip] if chip else list(CHIPS.values())
    return [f"{c.name}-{count * c.cores}" for c in chips for count in SHAPES[c.axes]]
