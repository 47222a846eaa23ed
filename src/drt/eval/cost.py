"""The matrix products of a DRT model, counted from its configuration.

They are the floor of the model's reading time: norms, softmax, gathering chunks and everything else come on top.
What is counted is what the mathematics needs, not what an implementation does: banded window attention, for one,
multiplies more than the W keys of each position.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def prefill_products(config: DRTConfig, segment_size: int, context_length: float) -> list[MatrixProduct]:
    """Matrix products of reading one segment.

    A segment of T tokens has T / S chunks and, each chunk having a landmark, T (S + 1) / S positions. Keys and
    values of the chunk memory are made for tokens only. The head gives one row of logits (`logits_to_keep=1`).

    Args:
        config: the model's.
        segment_size: tokens T of the segment.
        context_length: tokens already read; each chunk is scored against all the chunks in them. For the mean
            over a whole prompt give half its length.
    """
    size = config.hidden_size
    heads, (kv_heads, head_dim) = config.num_attention_heads, config.key_value_shape
    window, slots, top_k = config.sliding_window, config.chunk_size, config.retrieval_top_k
    chunks = segment_size / slots
    positions = segment_size + chunks
    layers, upper = config.num_hidden_layers, config.num_upper_layers
    products = [
        *_block("decoder", layers, positions, config),
        MatrixProduct("window q.k", "window", layers, heads * positions / window, window, head_dim, window),
        MatrixProduct("window p.v", "window", layers, heads * positions / window, window, window, head_dim),
        MatrixProduct("head", "projection", 1, 1, 1, size, config.vocab_size),
    ]
    if not config.retrieval:
        return products
    encoder, group_rows = config.num_encoder_layers, (slots + 1) * heads // kv_heads
    return [
        *products,
        *_block("encoder", encoder, positions, config),
        MatrixProduct("encoder q.k", "encoder", encoder, heads * chunks, slots + 1, head_dim, slots + 1),
        MatrixProduct("encoder p.v", "encoder", encoder, heads * chunks, slots + 1, slots + 1, head_dim),
        MatrixProduct("chunk k, v", "projection", 2, 1, segment_size, size, kv_heads * head_dim),
        MatrixProduct("chunks q, o", "projection", 2 * upper, 1, positions, size, size),
        MatrixProduct("chunks q.k", "chunks", upper, kv_heads * chunks, group_rows, head_dim, top_k * slots),
        MatrixProduct("chunks p.v", "chunks", upper, kv_heads * chunks, group_rows, top_k * slots, head_dim),
        MatrixProduct(
            "landmark scores", "retrieval", config.num_groups, 1, chunks, size, context_length / slots
        ),
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
