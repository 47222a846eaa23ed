"""The matrix products of a model, counted from its configuration: what reading and training cost.

They are the floor of a model's time: norms, softmax, gathering chunks and everything else come on top. What is counted
is what the mathematics needs, not what an implementation does: banded window attention, for one, multiplies more than
the keys that each position sees. Sizes may be fractional, for a row need not hold a whole number of chunks or windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from drt.models.block_recurrent import BlockRecurrentConfig
from drt.models.drt import DRTConfig
from drt.models.drt.chunk_layout import upper_reach
from drt.models.full_attention import FullAttentionConfig
from drt.models.landmark import LandmarkConfig
from drt.models.window import WindowConfig

# Dense bfloat16 operations a second, by a part of the device's name, from the vendor's data sheets.
_PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


@dataclass(frozen=True)
class MatrixProduct:
    """`count` times: `matrices` independent products of (rows, inner) by (inner, columns).

    Attributes:
        name: what the product is for.
        part: `projection` (a weight matrix), `window` (attention over the window, or over all that came before),
            `encoder` or `chunks` (attention inside the encoder, over retrieved chunks), `retrieval` (landmark scores,
            the only part of DRT that grows with length), or `state` (attention from and to a recurrent state).
    """

    name: str
    part: str
    count: int
    matrices: float
    rows: float
    inner: float
    columns: float

    @property
    def flops(self) -> float:
        """Floating-point operations of all of it; a multiplication and an addition are two."""
        return 2 * self.count * self.matrices * self.rows * self.inner * self.columns


def training_flops(config: Any, length: int) -> float:
    """Operations a token, forward and backward, in rows of `length` tokens.

    The backward pass takes twice the forward pass; what gradient checkpointing computes again is not counted (that is
    the convention of MFU, "model FLOPs utilisation").

    Raises:
        ValueError: as `training_products`.
    """
    return 3 * sum(product.flops for product in training_products(config, length)) / length


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 operations a second of a device; None where it is not known, as on CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


def training_products(config: Any, length: int) -> list[MatrixProduct]:
    """Matrix products of a forward pass over one row that wants every logit.

    Args:
        config: of one of drt's models. What a fixed retriever computes is not counted.
        length: tokens of the row.

    Raises:
        ValueError: another model's configuration.
    """
    if isinstance(config, DRTConfig):
        positions, chunks = length * (config.chunk_size + 1) / config.chunk_size, length / config.chunk_size
        return _drt(
            config,
            length,
            upper_positions=positions,
            head_rows=length,
            window_keys=_mean_keys(positions, config.sliding_window),
            # Chunk c retrieves from the c before it.
            chunks_read=max(_mean_keys(chunks, config.retrieval_top_k + 1) - 1, 0),
            chunks_scored=max(_mean_keys(chunks, chunks) - 1, 0),
        )
    if isinstance(config, LandmarkConfig):
        products = _landmark(config, length)
    elif isinstance(config, FullAttentionConfig):
        products = _decoder(
            "decoder", config.num_hidden_layers, length, length, _mean_keys(length, length), config
        )
    elif isinstance(config, WindowConfig):
        window = config.sliding_window
        products = _decoder(
            "decoder", config.num_hidden_layers, length, window, _mean_keys(length, window), config
        )
        if isinstance(config, BlockRecurrentConfig):
            products += _recurrence(config, length)
    else:
        raise ValueError(f"expected the configuration of one of drt's models, got {type(config).__name__}")
    return [*products, _head(config, length)]


def prefill_products(
    config: DRTConfig, segment_size: int, context_length: float, *, whole: bool = False
) -> list[MatrixProduct]:
    """Matrix products of reading one segment far into a text.

    A segment of T tokens has T / S chunks and, each chunk having a landmark, T (S + 1) / S positions. The head gives
    one row of logits (`logits_to_keep=1`), so the upper decoder runs over the end of the segment only, as far as
    `upper_reach` goes.

    Args:
        config: the model's.
        segment_size: tokens T of the segment.
        context_length: tokens already read; each chunk is scored against all the chunks in them. For the mean
            over a whole prompt give half its length.
        whole: count the upper decoder over all positions, as a pass that wants every logit runs it.
    """
    positions = segment_size * (config.chunk_size + 1) / config.chunk_size
    return _drt(
        config,
        segment_size,
        upper_positions=positions if whole else min(positions, upper_reach(config, 1)),
        head_rows=1,
        window_keys=config.sliding_window,
        chunks_read=config.retrieval_top_k,
        chunks_scored=context_length / config.chunk_size,
    )


def _drt(
    config: DRTConfig,
    tokens: int,
    *,
    upper_positions: float,
    head_rows: int,
    window_keys: float,
    chunks_read: float,
    chunks_scored: float,
) -> list[MatrixProduct]:
    """A forward pass over `tokens`; keys and values of the chunk memory are made for tokens only.

    The last layer reads chunks, and runs its MLP, only where a state is required.
    """
    size, window, slots = config.hidden_size, config.sliding_window, config.chunk_size
    lower, upper, encoder = config.num_lower_layers, sum(config.layers_per_group), config.num_encoder_layers
    positions = tokens + tokens / slots
    products = _decoder("lower", lower, positions, window, window_keys, config)
    if upper:
        products += [
            *_projections("upper", upper, upper_positions, config),
            *_attention("upper window", "window", upper, upper_positions, window, window_keys, config),
            *_mlp("upper", upper - 1, upper_positions, config),
            *_mlp("upper last", 1, head_rows, config),
        ]
    products.append(_head(config, head_rows))
    if not config.retrieval:
        return products
    kv_heads, head_dim = config.key_value_shape
    products += [
        *_block("encoder", encoder, positions, config),
        *_attention("encoder", "encoder", encoder, positions, slots + 1, slots + 1, config),
        MatrixProduct("chunk k, v", "projection", 2, 1, tokens, size, kv_heads * head_dim),
    ]
    if not upper:  # nobody reads what is remembered
        return products
    products += [
        *_chunks("chunks", upper - 1, upper_positions, chunks_read, config),
        *_chunks("chunks last", 1, head_rows, chunks_read, config),
    ]
    if config.retriever == "learned":
        reading = upper_positions / (slots + 1)  # chunks whose landmarks retrieve
        groups = len(config.layers_per_group)
        products.append(
            MatrixProduct("landmark scores", "retrieval", groups, 1, reading, size, chunks_scored)
        )
    return products


def _chunks(
    name: str, layers: int, positions: float, chunks_read: float, config: DRTConfig
) -> list[MatrixProduct]:
    """Cross-attention of positions, of which a chunk's share what they read; heads that share keys are one matrix."""
    size, slots = config.hidden_size, config.chunk_size
    kv_heads, head_dim = config.key_value_shape
    rows, read = (slots + 1) * config.num_attention_heads // kv_heads, chunks_read * slots
    matrices = kv_heads * positions / (slots + 1)
    return [
        MatrixProduct(f"{name} q, o", "projection", 2 * layers, 1, positions, size, size),
        MatrixProduct(f"{name} q.k", "chunks", layers, matrices, rows, head_dim, read),
        MatrixProduct(f"{name} p.v", "chunks", layers, matrices, rows, read, head_dim),
    ]


def _landmark(config: LandmarkConfig, length: int) -> list[MatrixProduct]:
    """Every position sees all tokens and landmarks before it, but landmarks have no values."""
    layers, slots = config.num_hidden_layers, config.chunk_size + 1
    positions = length * slots / config.chunk_size
    seen = _mean_keys(positions, positions)
    heads, head_dim = config.num_attention_heads, config.key_value_shape[1]
    return [
        *_block("decoder", layers, positions, config),
        MatrixProduct("decoder q.k", "window", layers, heads, positions, head_dim, seen),
        MatrixProduct(
            "decoder p.v", "window", layers, heads, positions, seen * config.chunk_size / slots, head_dim
        ),
    ]


def _recurrence(config: BlockRecurrentConfig, length: int) -> list[MatrixProduct]:
    """What the recurrent cell adds to a window layer: tokens read the state, and after each block it reads them."""
    size, states, block = config.hidden_size, config.num_states, config.block_size
    kv_size = config.key_value_shape[0] * config.key_value_shape[1]
    blocks = length / block
    return [
        MatrixProduct("token to state q, o", "projection", 2, 1, length, size, size),
        *_attention("token to state", "state", 1, length, block, states, config),
        MatrixProduct("state k, v", "projection", 2, blocks, states, size, kv_size),
        MatrixProduct("state to state q, to token q", "projection", 2, blocks, states, size, size),
        *_attention("state to state", "state", 1, blocks * states, states, states, config),
        *_attention("state to token", "state", 1, blocks * states, states, block, config),
        MatrixProduct("state o", "projection", 1, blocks, states, 2 * size, size),
    ]


def _head(config: Any, rows: int) -> MatrixProduct:
    return MatrixProduct("head", "projection", 1, 1, rows, config.hidden_size, config.vocab_size)


def _decoder(
    name: str, layers: int, positions: float, window: float, keys: float, config: Any
) -> list[MatrixProduct]:
    """Layers in which each position sees `keys` of the `window` before it on average."""
    return [
        *_block(name, layers, positions, config),
        *_attention(f"{name} window", "window", layers, positions, window, keys, config),
    ]


def _block(name: str, layers: int, positions: float, config: Any) -> list[MatrixProduct]:
    """Projections of an attention and an MLP, `layers` times."""
    return [*_projections(name, layers, positions, config), *_mlp(name, layers, positions, config)]


def _projections(name: str, layers: int, positions: float, config: Any) -> list[MatrixProduct]:
    size, (kv_heads, head_dim) = config.hidden_size, config.key_value_shape
    return [
        MatrixProduct(f"{name} q, o", "projection", 2 * layers, 1, positions, size, size),
        MatrixProduct(f"{name} k, v", "projection", 2 * layers, 1, positions, size, kv_heads * head_dim),
    ]


def _mlp(name: str, layers: int, positions: float, config: Any) -> list[MatrixProduct]:
    size, inner_size = config.hidden_size, config.intermediate_size
    return [
        MatrixProduct(f"{name} mlp gate, up", "projection", 2 * layers, 1, positions, size, inner_size),
        MatrixProduct(f"{name} mlp down", "projection", layers, 1, positions, inner_size, size),
    ]


def _attention(
    name: str, part: str, layers: int, positions: float, rows: float, keys: float, config: Any
) -> list[MatrixProduct]:
    """Scores and what is read with them, `rows` of the `positions` at a time, each over `keys` of its own."""
    head_dim = config.key_value_shape[1]
    matrices = config.num_attention_heads * positions / rows
    return [
        MatrixProduct(f"{name} q.k", part, layers, matrices, rows, head_dim, keys),
        MatrixProduct(f"{name} p.v", part, layers, matrices, rows, keys, head_dim),
    ]


def _mean_keys(positions: float, window: float) -> float:
    """Keys that a position sees on average: all up to itself, at most `window`."""
    if positions <= window:
        return (positions + 1) / 2
    return window - window * (window - 1) / (2 * positions)
