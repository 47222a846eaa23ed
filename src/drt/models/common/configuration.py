"""What the configurations of the baselines share."""

# No `from __future__ import annotations`: it makes annotations strings, whose fields @strict does not check.

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class DecoderConfig(PreTrainedConfig):
    """Sizes of a plain decoder; the names and defaults are those of `DRTConfig` (the paper's 128M parameters).

    Args:
        vocab_size: entries of the token embedding; 259 is the byte vocabulary of ``ByT5Tokenizer(extra_ids=0)``.
        hidden_size: width H.
        intermediate_size: width of the SwiGLU MLPs.
        num_hidden_layers: layers.
        num_attention_heads: query heads h.
        num_key_value_heads: key/value heads, a divisor of h. ``None``: as many as query heads.
        head_dim: width D of a head. ``None``: ``hidden_size // num_attention_heads``.
        position_embedding: ``"alibi"`` or ``"rope"``.
        rope_theta: base of the rotary angles.
        rms_norm_eps: epsilon of the norms.
        initializer_range: standard deviation of the initial weights.

    Raises:
        ValueError: for sizes that do not fit each other; the message names what was got and what is wanted.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    least_sizes: ClassVar[dict[str, int]] = {}  # least useful values of a subclass's own sizes

    vocab_size: int = 259
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    position_embedding: str = "rope"
    rope_theta: float | int = 10000.0
    rms_norm_eps: float | int = 1e-5
    initializer_range: float | int = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 1

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        sizes = (self.hidden_size, self.num_attention_heads)
        if self.head_dim is None and all(isinstance(size, int) for size in sizes):
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        super().__post_init__(**kwargs)

    @property
    def key_value_shape(self) -> tuple[int, int]:
        """(h_kv, D): key/value heads and their width, with what stood for ``None`` filled in."""
        assert self.num_key_value_heads is not None  # both by __post_init__
        assert self.head_dim is not None
        return self.num_key_value_heads, self.head_dim

    def validate_sizes(self) -> None:
        """Part of ``PreTrainedConfig`` validation: every size is at least its least useful value."""
        least = {
            "vocab_size": 1,
            "hidden_size": 1,
            "intermediate_size": 1,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 2,
            **self.least_sizes,
        }
        for name, minimum in least.items():
            value = getattr(self, name)
            if value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")

    def validate_heads(self) -> None:
        """Part of ``PreTrainedConfig`` validation: heads divide evenly."""
        if self.num_key_value_heads is None or self.head_dim is None:
            raise ValueError(
                "num_key_value_heads and head_dim may be None only while a configuration is made"
            )
        if self.num_attention_heads % max(self.num_key_value_heads, 1):
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads, got {self.num_key_value_heads} and "
                f"{self.num_attention_heads}"
            )
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"hidden_size must be num_attention_heads x head_dim, got {self.hidden_size} and "
                f"{self.num_attention_heads} x {self.head_dim}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")

    def validate_position_embedding(self) -> None:
        """Part of ``PreTrainedConfig`` validation: a known kind of position."""
        if self.position_embedding not in ("alibi", "rope"):
            raise ValueError(f'position_embedding must be "alibi" or "rope", got {self.position_embedding!r}')
