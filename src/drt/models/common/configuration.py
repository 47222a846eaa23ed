"""What the configurations of all models share, and the checks that a checkpoint's config.json must pass."""

# No `from __future__ import annotations`: it makes annotations strings, whose fields @strict does not check.

import inspect
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict

from drt.models.common.packaged import PackagedConfig

# Far beyond any model there is; a larger number is a mistake or a trap, and takes hours or gigabytes to find out.
MOST_LAYERS = 1024
MOST_TOKENS = 2**24  # of a window
MOST_CHUNKS = MOST_CHUNK_TOKENS = 2**16
MOST_RETRIEVED = 2**12

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What makes the library fetch, load or build something else than our classes say.
_MACHINERY = (
    "distributed_config",
    "fusion_config",
    "kernel_config",
    "per_layer_config",
    "quantization_config",
    "transformers_weights",
    "use_kernels",
)


@strict
class ModelConfig(PackagedConfig):
    """Fields of every model; see `DecoderConfig` and `DRTConfig` for what they mean.

    Args:
        max_position_embeddings: tokens of a text that tools such as lm-eval give the model; they cut longer ones. The
            model has no limit of its own.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "vocab_size": (1, 2**24),
        "hidden_size": (1, 2**16),
        "intermediate_size": (1, 2**20),
        "num_attention_heads": (1, 2**16),
        "num_key_value_heads": (1, 2**16),
        "head_dim": (2, 2**16),
        "rope_theta": (1e-3, 1e30),
        "rms_norm_eps": (0, 1),
        "initializer_range": (0, 1000),
        "max_position_embeddings": (1, 2**36),
    }  # least and most useful values of the sizes

    vocab_size: int = 259
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    position_embedding: str = "rope"
    rope_theta: float | int = 10000.0
    rms_norm_eps: float | int = 1e-5
    initializer_range: float | int = 0.02
    max_position_embeddings: int = 2**20
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
        self._refuse_machinery(kwargs)
        super().__post_init__(**kwargs)
        for name in ("attn_implementation", "experts_implementation"):
            wanted = getattr(self, f"_{name}")
            if wanted not in (None, "eager"):
                raise ValueError(
                    f'{name} must be "eager": these models bring their own attention; got {wanted!r}'
                )

    def _refuse_machinery(self, others: dict[str, Any]) -> None:
        """Refuse what is none of a configuration's fields and would change what the library does with them."""
        for name in _MACHINERY:
            if value := others.get(name):
                raise ValueError(f"{name} is not supported by {self.model_type} models, got {value!r}")
        if self.is_encoder_decoder:
            raise ValueError(f"is_encoder_decoder must be False: {self.model_type} models have no encoder")
        for name, value in others.items():
            own = inspect.getattr_static(type(self), name, None)
            read_only = isinstance(own, property) and own.fset is None
            if read_only or callable(getattr(type(self), name, None)):
                raise ValueError(f"{name} is not a field of {type(self).__name__}, got {value!r}")
        if "num_labels" in others and not (
            isinstance(labels := others["num_labels"], int) and labels < 2**16
        ):
            raise ValueError(f"num_labels must be at most {2**16 - 1:,}, got {labels!r}")
        dtype = self.dtype if self.dtype is not None else others.get("torch_dtype")
        known = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
        if dtype is not None and known not in _DTYPES:
            names = ", ".join(str(one).removeprefix("torch.") for one in _DTYPES)
            raise ValueError(f"dtype must be one of {names}, got {dtype!r}")

    @property
    def key_value_shape(self) -> tuple[int, int]:
        """(h_kv, D): key/value heads and their width, with what stood for ``None`` filled in."""
        assert self.num_key_value_heads is not None  # both by __post_init__
        assert self.head_dim is not None
        return self.num_key_value_heads, self.head_dim

    def validate_sizes(self) -> None:
        """Part of ``PreTrainedConfig`` validation: every size is of some use, and none beyond all sense."""
        for name, (least, most) in self.ranges.items():
            value = getattr(self, name)
            if not value >= least:  # as a NaN is not
                raise ValueError(f"{name} must be at least {least}, got {value}")
            if value > most:
                raise ValueError(f"{name} must be at most {most:,}, got {value:,}")

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

    def validate_token_ids(self) -> None:
        """Part of ``PreTrainedConfig`` validation: special tokens have an entry in the vocabulary."""
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(f"{name} must lie in [0, vocab_size = {self.vocab_size}), got {token}")

    def validate_position_embedding(self) -> None:
        """Part of ``PreTrainedConfig`` validation: a known kind of position."""
        if self.position_embedding not in ("alibi", "rope"):
            raise ValueError(f'position_embedding must be "alibi" or "rope", got {self.position_embedding!r}')


@strict
class DecoderConfig(ModelConfig):
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
        Others as in `ModelConfig`.

    Raises:
        ValueError: for sizes that do not fit each other or are beyond any sense, and for what these models do not
            support; the message names what was expected and what was given.
    """

    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        **ModelConfig.ranges,
        "num_hidden_layers": (1, MOST_LAYERS),
    }

    num_hidden_layers: int = 12
