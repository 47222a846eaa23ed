"""The matrix products of a DRT model, counted from its configuration.

They are the floor of the model's reading time: norms, softmax, gathering chunks and everything else come on top.
What is counted is what the mathematics needs, not what an implementation does: banded window attention, for one,
multiplies more than the W keys of each position.
"""

from __future__ import annotations

from dataclasses import dataclass

from drt.models.drt.chunk_layout import upper_reach
from drt.models.drt.configuration_drt import DRTConfig


@dataclass(frozen=True)
class MatrixProduct:
    """`count` times: `matrices` independent products of (rows, inner) by (inner, columns).

    Sizes may be fractional: a segment need not hold a whole number of chunks or windows.

    Attributes:
        name: what the product is for.
        part: `projection` (a weight matrix), `window`, `encoder` or `chunks` (attention over the window, inside the
            encoder, over retrieved chunks), or `retrieval` (landmark scores, the only part that grows with length).
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


def prefill_products(
    config: DRTConfig, segment_size: int, context_length: float, *, whole: bool = False
) -> list[MatrixProduct]:
    """Matrix products of reading one segment.

    A segment of T tokens has T / S chunks and, each chunk having a landmark, T (S + 1) / S positions. Keys and
    values of the chunk memory are made for tokens only. The head gives one row of logits (`logits_to_keep=1`), so
    the upper decoder runs over the end of the segment only, as far as `upper_reach` goes.

    Args:
        config: the model's.
        segment_size: tokens T of the segment.
        context_length: tokens already read; each chunk is scored against all the chunks in them. For the mean
            over a whole prompt give half its length.
        whole: count the upper decoder over all positions, as a pass that wants every logit runs it.
    """
    size = config.hidden_size
    heads, (kv_heads, head_dim) = config.num_attention_heads, config.key_value_shape
    slots, top_k = config.chunk_size, config.retrieval_top_k
    lower, upper = config.num_lower_layers, config.num_upper_layers
    chunks = segment_size / slots
    positions = segment_size + chunks
    end = positions if whole else min(positions, upper_reach(config, 1))
    products = [
        *_decoder("lower", lower, positions, config),
        *_decoder("upper", upper, end, config),
        MatrixProduct("head", "projection", 1, 1, 1, size, config.vocab_size),
    ]
    if not config.retrieval:
        return products
    encoder, group_rows = config.num_encoder_layers, (slots + 1) * heads // kv_heads
    reading = end / (slots + 1)  # chunks whose landmarks retrieve
    return [
        *products,
        *_block("encoder", encoder, positions, config),
        MatrixProduct("encoder q.k", "encoder", encoder, heads * chunks, slots + 1, head_dim, slots + 1),
        MatrixProduct("encoder p.v", "encoder", encoder, heads * chunks, slots + 1, slots + 1, head_dim),
        MatrixProduct("chunk k, v", "projection", 2, 1, segment_size, size, kv_heads * head_dim),
        MatrixProduct("chunks q, o", "projection", 2 * upper, 1, end, size, size),
        MatrixProduct("chunks q.k", "chunks", upper, kv_heads * reading, group_rows, head_dim, top_k * slots),
        MatrixProduct("chunks p.v", "chunks", upper, kv_heads * reading, group_rows, top_k * slots, head_dim),
        MatrixProduct(
            "landmark scores", "retrieval", config.num_groups, 1, reading, size, context_length / slots
        ),
    ]


def _decoder(name: str, layers: int, positions: float, config: DRTConfig) -> list[MatrixProduct]:
    """Window attention and an MLP, `layers` times."""
    heads, head_dim, window = config.num_attention_heads, config.key_value_shape[1], config.sliding_window
    windows = heads * positions / window
    return [
        *_block(name, layers, positions, config),
        MatrixProduct(f"{name} window q.k", "window", layers, windows, window, head_dim, window),
        MatrixProduct(f"{name} window p.v", "window", layers, windows, window, window, head_dim),
    ]


def _block(name: str, layers: int, positions: float, config: DRTConfig) -> list[MatrixProduct]:
    """Projections of an attention and an MLP, `layers` times."""
    size, inner_size = config.hidden_size, config.intermediate_size
    kv_heads, head_dim = config.key_value_shape
    kv_size = kv_heads * head_dim
    return [
        MatrixProduct(f"{name} q, o", "projection", 2 * layers, 1, positions, size, size),
        MatrixProduct(f"{name} k, v", "projection", 2 * layers, 1, positions, size, kv_size),
        MatrixProduct(f"{name} mlp gate, up", "projection", 2 * layers, 1, positions, size, inner_size),
        MatrixProduct(f"{name} mlp down", "projection", layers, 1, positions, inner_size, size),
    ]
