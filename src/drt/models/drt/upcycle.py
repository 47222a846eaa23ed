"""Give a pretrained Llama a chunk memory: its layers become the two decoders, and what is new starts out silent.

The first layers become the lower decoder, the others the upper one, weight by weight. The chunk encoder is copied from
the layers that follow the cut. Grouped cross-attention starts with an output projection of zero, so that the first
forward pass is the base with a sliding window, but for the landmarks between the chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from drt.errors import DRTError
from drt.models.drt.configuration_drt import DRTConfig
from drt.models.drt.modeling_drt import DRTForCausalLM

SOURCE_FILE = "upcycling.json"  # beside a converted model: where its base came from
BASES = ("llama", "mistral")  # model types whose blocks are these


@dataclass(frozen=True, kw_only=True)
class UpcycleOptions:
    """Sizes of what a base is converted to.

    Args:
        num_lower_layers: layers of the base below the chunk encoder. ``None``: a third of them. Reading a text costs
            these and the encoder.
        num_groups: groups of upper layers; each retrieves once.
        num_encoder_layers: layers of the chunk encoder.
        chunk_size: tokens of a chunk.
        retrieval_top_k: chunks retrieved at a time.
        sliding_window: keys that a position sees.
    """

    num_lower_layers: int | None = None
    num_groups: int = 2
    num_encoder_layers: int = 2
    chunk_size: int = 63
    retrieval_top_k: int = 8
    sliding_window: int = 512


class TextLosses(NamedTuple):
    """Mean loss in nats per token of one text: the base with full attention, the base with a window, the conversion."""

    base: float
    base_with_window: float
    converted: float


def upcycle(
    base: PreTrainedModel, options: UpcycleOptions, text_ids: Tensor, landmark_token: int
) -> DRTForCausalLM:
    """Convert a pretrained model.

    Args:
        base: a causal language model with Llama's blocks, in float32 on the CPU.
        options: sizes of the result.
        text_ids: (1, L) token ids of a text; the scale of the base's states is measured on it.
        landmark_token: the token whose embedding the landmark starts as, such as a line break.

    Returns:
        A model in eval mode that shares no memory with the base.

    Raises:
        DRTError: the base has other blocks than Llama's, or the options do not fit it.
    """
    config = make_config(base, options)
    model = DRTForCausalLM(config).eval()
    layers = list(base.model.layers)
    with torch.no_grad():
        _copy(base.get_input_embeddings(), model.model.embed_tokens)
        _copy(base.model.norm, model.model.norm)
        if not config.tie_word_embeddings:
            _copy(base.get_output_embeddings(), model.lm_head)
        for source, target in zip(
            layers, [*model.model.lower_layers, *model.model.upper_layers], strict=True
        ):
            _copy(source.input_layernorm, target.attention_norm)
            _copy(source.post_attention_layernorm, target.mlp_norm)
            _copy_projections(source.self_attn, target.window_attention)
            _copy_mlp(source.mlp, target.mlp)
        encoder = zip(layers[config.num_lower_layers :], model.model.chunk_encoder.layers, strict=False)
        for source, target in encoder:
            _copy(source.input_layernorm, target.input_norm)
            _copy(source.post_attention_layernorm, target.mlp_norm)
            _copy_projections(source.self_attn, target)
            _copy_mlp(source.mlp, target.mlp)
        model.model.chunk_encoder.input_norm.weight.fill_(_scale_at(base, config.num_lower_layers, text_ids))
        embedding: Any = base.get_input_embeddings()
        model.model.landmark_embedding.copy_(embedding.weight[landmark_token])
        for layer in model.model.upper_layers:
            layer.grouped_cross_attention.o_proj.weight.zero_()
    return model


def make_config(base: PreTrainedModel, options: UpcycleOptions) -> DRTConfig:
    """The configuration of the converted model.

    Raises:
        DRTError: the base has other blocks than Llama's, or the options do not fit it.
    """
    source = base.config
    for problem in _differences(source):
        raise DRTError(f"the base cannot be converted: {problem}")
    layers = source.num_hidden_layers
    lower = layers // 3 if options.num_lower_layers is None else options.num_lower_layers
    if not 1 <= lower < layers:
        raise DRTError(f"expected 1 to {layers - 1} lower layers of the base's {layers}, got {lower}")
    if not 0 <= options.num_encoder_layers <= layers - lower:
        raise DRTError(
            f"expected at most {layers - lower} encoder layers, as many as follow the cut, got "
            f"{options.num_encoder_layers}"
        )
    try:
        return DRTConfig(
            vocab_size=source.vocab_size,
            hidden_size=source.hidden_size,
            intermediate_size=source.intermediate_size,
            num_lower_layers=lower,
            num_upper_layers=layers - lower,
            num_groups=options.num_groups,
            num_encoder_layers=options.num_encoder_layers,
            num_attention_heads=source.num_attention_heads,
            num_key_value_heads=source.num_key_value_heads,
            head_dim=getattr(source, "head_dim", None),
            chunk_size=options.chunk_size,
            retrieval_top_k=options.retrieval_top_k,
            sliding_window=options.sliding_window,
            position_embedding="rope",
            rope_theta=source.rope_parameters["rope_theta"],
            learned_temperature=True,
            rms_norm_eps=source.rms_norm_eps,
            encoder_rms_norm_eps=source.rms_norm_eps,
            initializer_range=source.initializer_range,
            tie_word_embeddings=source.tie_word_embeddings,
            pad_token_id=source.pad_token_id,
            bos_token_id=source.bos_token_id,
            eos_token_id=source.eos_token_id,
        )
    except (StrictDataclassError, ValueError) as error:
        raise DRTError(f"the base and the options do not fit: {error.__cause__ or error}") from error


@torch.no_grad()
def text_losses(base: PreTrainedModel, converted: DRTForCausalLM, text_ids: Tensor) -> TextLosses:
    """The losses of one text (1, L): what the window costs, and what the conversion changes."""
    length = text_ids.shape[1]
    position = torch.arange(length)
    distance = position[:, None] - position
    window = (distance >= 0) & (distance < converted.config.sliding_window)
    bias = torch.zeros(1, 1, length, length).masked_fill(~window, torch.finfo(torch.float32).min)

    def loss(logits: Tensor) -> float:
        return float(F.cross_entropy(logits[0, :-1].float(), text_ids[0, 1:]))

    return TextLosses(
        base=loss(base(text_ids, use_cache=False).logits),
        base_with_window=loss(base(text_ids, attention_mask=bias, use_cache=False).logits),
        converted=loss(converted(text_ids, use_cache=False).logits),
    )


def _differences(config: Any) -> Iterator[str]:
    """What of a configuration this architecture does not have, in words."""
    if config.model_type not in BASES:
        yield f"expected a model of type {' or '.join(BASES)}, got {config.model_type!r}"
        return
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            yield f"expected layers without biases, got {name}=True"
    if config.hidden_act != "silu":
        yield f"expected hidden_act 'silu', got {config.hidden_act!r}"
    kind = config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        yield f"expected plain rotary positions (rope_type 'default'), got {kind!r}"


def _scale_at(base: PreTrainedModel, layer: int, text_ids: Tensor) -> float:
    """Median over a text's tokens of the root mean square of the base's state below a layer."""
    states = base(text_ids, output_hidden_states=True, use_cache=False).hidden_states[layer]
    return float(states.float().pow(2).mean(-1).sqrt().median())


def _copy(source: Any, target: Any) -> None:
    target.weight.copy_(source.weight)


def _copy_projections(source: nn.Module, target: nn.Module) -> None:
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        _copy(getattr(source, name), getattr(target, name))


def _copy_mlp(source: nn.Module, target: nn.Module) -> None:
    for name in ("gate_proj", "up_proj", "down_proj"):
        _copy(getattr(source, name), getattr(target, name))
