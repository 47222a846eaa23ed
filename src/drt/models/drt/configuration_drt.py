"""Configuration of the Differentiable Retrieval-based Transformer (arXiv 2410.01651)."""

# No `from __future__ import annotations`: it makes annotations strings, whose fields @strict does not check.

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from drt.layers.fixed_retrievers import FIXED_RETRIEVERS
from drt.models.common.configuration import (
    MOST_CHUNK_TOKENS,
    MOST_LAYERS,
    MOST_RETRIEVED,
    MOST_TOKENS,
    ModelConfig,
)


@strict
class DRTConfig(ModelConfig):
    """Sizes and rules of a DRT model.

    The defaults are the sizes of the paper's 128M-parameter model with this project's rules (``landmark_predicts``,
    bytes as vocabulary).

    Args:
        vocab_size: entries of the token embedding; 259 is the byte vocabulary of ``ByT5Tokenizer(extra_ids=0)``.
        hidden_size: width H.
        intermediate_size: width of the SwiGLU MLPs.
        num_lower_layers: layers below the chunk encoder (window attention only).
        num_upper_layers: layers above it (window attention and grouped cross-attention). Where groups differ, a list of
            the layers of each, from the bottom: ``[1, 2]``. A list of equal numbers becomes their sum.
        num_groups: groups G of upper layers; each retrieves once. Divides ``num_upper_layers``, or is the length of
            that list. ``None``: one, or as many as are listed.
        num_encoder_layers: bidirectional layers of the chunk encoder.
        num_attention_heads: query heads h.
        num_key_value_heads: key/value heads of window attention, chunk encoder and chunk memory; divides h.
            ``None``: as many as query heads.
        head_dim: width D of a head. ``None``: ``hidden_size // num_attention_heads``.
        chunk_size: tokens S in a full chunk (its landmark not counted).
        retrieval_top_k: retrieved chunks K per selection.
        sliding_window: keys W that a position sees, itself included.
        position_embedding: ``"alibi"`` or ``"rope"``, for window attention.
        rope_theta: base of the rotary angles (encoder, and window attention with ``"rope"``).
        sink: softmax-off-by-one in grouped cross-attention, so that a token may ignore a chunk.
        landmark_predicts: the logits at a chunk's last token come from its landmark, which already uses what it
            retrieved. ``False`` is the paper's rule.
        close_prompt: `generate` closes the open chunk at the end of a prompt, as ``chunk_ends`` did in training.
            ``False`` for a model that was trained on plain text. It is the default of ``close_prompt`` in the
            generation configuration.
        gumbel_noise: add Gumbel noise to the scores before the selection, in training mode only.
        learned_temperature: multiply retrieval scores by a learned factor per group (ours; starts at 1).
        retriever: ``"learned"``, or what it is compared with: a fixed one, ``"random"``, ``"bm25"`` over token ids or
            ``"embedding"`` (an off-the-shelf text embedder, see `drt.models.drt.embedder`), whose chunks are read by
            chunked cross-attention: one softmax over all of them, no weights. Fixed ones have one group.
        retrieval: ``False`` removes encoder, retrieval and grouped cross-attention: the window model alone.
        rms_norm_eps: epsilon of the decoder's norms.
        encoder_rms_norm_eps: epsilon of the norms inside the chunk encoder.
        initializer_range: standard deviation of the initial weights.
        Others as in `ModelConfig`.

    Raises:
        ValueError: for sizes that do not fit each other or are beyond any sense, and for what the model does not
            support; the message names what was expected and what was given.
    """

    model_type = "drt"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        **ModelConfig.ranges,
        "num_lower_layers": (1, MOST_LAYERS),
        "num_groups": (1, MOST_LAYERS),
        "num_encoder_layers": (0, MOST_LAYERS),
        "chunk_size": (1, MOST_CHUNK_TOKENS),
        "retrieval_top_k": (1, MOST_RETRIEVED),
        "sliding_window": (1, MOST_TOKENS),
        "encoder_rms_norm_eps": (0, 1),
    }

    num_lower_layers: int = 6
    num_upper_layers: int | list[int] = 6
    num_groups: int | None = None
    num_encoder_layers: int = 2
    chunk_size: int = 63
    retrieval_top_k: int = 8
    sliding_window: int = 512
    position_embedding: str = "alibi"
    sink: bool = True
    landmark_predicts: bool = True
    close_prompt: bool = True
    gumbel_noise: bool = False
    learned_temperature: bool = False
    retriever: str = "learned"
    retrieval: bool = True
    encoder_rms_norm_eps: float | int = 1e-6

    def __post_init__(self, **kwargs: Any) -> None:
        layers = self.num_upper_layers
        if self.num_groups is None:
            self.num_groups = len(layers) if isinstance(layers, list) else 1
        if isinstance(layers, list) and len(layers) == self.num_groups and len(set(layers)) == 1:
            self.num_upper_layers = sum(layers)  # one model, one way to write its configuration
        super().__post_init__(**kwargs)

    @property
    def layers_per_group(self) -> list[int]:
        """Upper layers of each of the G groups, from the bottom."""
        if isinstance(self.num_upper_layers, list):
            return self.num_upper_layers
        assert self.num_groups is not None  # by __post_init__
        return [self.num_upper_layers // self.num_groups] * self.num_groups

    @property
    def num_hidden_layers(self) -> int:
        """Decoder layers, lower and upper."""
        return self.num_lower_layers + sum(self.layers_per_group)

    def validate_groups(self) -> None:
        """Part of ``PreTrainedConfig`` validation: groups of upper layers are equal, or listed one by one."""
        layers, groups = self.num_upper_layers, self.num_groups
        if groups is None:
            raise ValueError("num_groups may be None only while a DRTConfig is made")
        count = sum(layers) if isinstance(layers, list) else layers
        if count > MOST_LAYERS:
            raise ValueError(f"num_upper_layers must be at most {MOST_LAYERS:,} layers, got {count:,}")
        if isinstance(layers, list):
            if min(layers, default=0) < 1:
                raise ValueError(f"num_upper_layers must list at least 1 layer for each group, got {layers}")
            if groups != len(layers):
                raise ValueError(
                    f"num_groups must be the {len(layers)} groups that num_upper_layers lists, or be left out; got "
                    f"{groups} and {layers}"
                )
        elif layers < 0:
            raise ValueError(f"num_upper_layers must be at least 0, got {layers}")
        elif layers % max(groups, 1):  # 0 is refused by validate_sizes
            raise ValueError(
                f"num_groups must divide num_upper_layers, got {groups} and {layers}; list the layers of each group "
                "where they differ, as in num_upper_layers: [1, 2]"
            )

    def validate_retriever(self) -> None:
        """Part of ``PreTrainedConfig`` validation: a known retriever, and nothing asked of it that it cannot do."""
        known = ("learned", *FIXED_RETRIEVERS)
        if self.retriever not in known:
            raise ValueError(f"retriever must be one of {', '.join(known)}, got {self.retriever!r}")
        if self.retriever != "learned" and (self.num_groups != 1 or self.learned_temperature):
            raise ValueError(
                f"retriever {self.retriever!r} retrieves the same for every group and has nothing to learn: num_groups "
                f"must be 1 and learned_temperature False, got {self.num_groups} and {self.learned_temperature}"
            )
