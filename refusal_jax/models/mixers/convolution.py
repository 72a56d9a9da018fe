"""Short causal convolutions over the tokens, each channel for itself, and the mixer that is little more than one."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from refusal_jax.axes import Array
from refusal_jax.models.attention import Context
from refusal_jax.models.cache import State
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.layers import linear
from refusal_jax.models.mixers.mixer import Mixed
from refusal_jax.models.weight import Weight, growth


def windowed(
    x_btc: Float[jax.Array, "B T C"],
    weight_cw: Float[Array, "C W"],
    mask_bt: Bool[Array, "B T"],
    past_bcw: Float[jax.Array, "B C W-1"] | None,
) -> tuple[Float[jax.Array, "B T C"], Float[jax.Array, "B C W-1"]]:
    """Returns each channel's products with its weights, of which the last is that of the token itself, summed over the last W
    tokens, and the last W - 1 inputs after these tokens; float32 inside, the dtype of x outside.

    past: the last inputs before these tokens, None for none. Rows are left-padded, and padding is no token: a window that goes
    beyond the first real one sees the past.
    """
    length, width = x_btc.shape[1], weight_cw.shape[1]
    inputs_bsc = jnp.pad(jnp.where(mask_bt[..., None], x_btc, 0), ((0, 0), (width - 1, 0), (0, 0)))
    if past_bcw is not None:  # it belongs right before the first real token, where there is room
        padding_b1 = length - jnp.sum(mask_bt, axis=1, keepdims=True, dtype=jnp.int32)
        place_bs = jnp.arange(length + width - 1) - padding_b1
        for index in range(width - 1):
            value_b1c = past_bcw[:, None, :, index].astype(x_btc.dtype)
            inputs_bsc = jnp.where((place_bs == index)[..., None], value_b1c, inputs_bsc)
    shifted = (inputs_bsc[:, index : index + length].astype(jnp.float32) for index in range(width))
    y_btc = sum(x * weight_cw[:, index].astype(jnp.float32) for index, x in enumerate(shifted))
    return jnp.asarray(y_btc).astype(x_btc.dtype), inputs_bsc[:, length:].swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class ShortConvolution:
    """The mixer of LFM2: a convolution over `taps` tokens, whose input and output each are multiplied by a gate.

    bias: whether its projections and the convolution have biases.
    """

    taps: int
    bias: bool
    reads: int | None = None
    has_heads = False

    def weights(self, cfg: ModelConfig) -> dict[str, Weight]:
        """Returns each weight of one layer by its name."""
        d, inner = cfg.d_model, ("conv_enter", "conv_leave", "conv_x")
        block = {name: Weight((d, d), ("mlp", "embed"), d**-0.5) for name in inner}
        block["conv_taps"] = Weight((d, 1, self.taps), ("mlp", "norm", "norm"), self.taps**-0.5)
        block["conv_o"] = Weight((d, d), ("embed", "mlp"), growth(cfg) * d**-0.5)
        if self.bias:
            block |= {f"{name}_bias": Weight((d,), ("mlp",), 0.0) for name in (*inner, "conv_taps")}
            block["conv_o_bias"] = Weight((d,), ("norm",), 0.0)
        return block

    def memory(self, cfg: ModelConfig, rows: int, tokens: int, dtype) -> State:
        """Returns room for the last inputs of the convolution, zeros."""
        return State((jnp.zeros((rows, cfg.d_model, self.taps - 1), dtype),))

    def mix(self, here, h_btd: Float[jax.Array, "B T D"], ctx: Context, past: State | None) -> Mixed:
        """Returns the gated convolution of the input, as `Mixer.mix` does; its memory is the convolution's last inputs."""

        def inner(name: str):
            return linear(h_btd, here.factored(f"conv_{name}"), here.weight(f"conv_{name}_bias"))

        weight_cw = here.weight("conv_taps")[:, 0]
        y, last = windowed(inner("enter") * inner("x"), weight_cw, ctx.mask_bt, None if past is None else past.parts[0])
        bias = here.weight("conv_taps_bias")
        y = y if bias is None else y + bias
        return Mixed(here.out("conv_o", inner("leave") * y), State((last,)))
