"""What the DRT models return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput


@dataclass
class DRTModelOutput(ModelOutput):
    """Output of `DRTModel`.

    Attributes:
        last_hidden_state: (B, L, H), aligned with the input: what predicts the token after each input token; with
            ``states_to_keep``, of the last of them only.
        past_key_values: the decoding state, when ``use_cache``.
        hidden_states: with ``output_hidden_states``, (B, L, H) each: the embeddings, then what every lower and upper
            layer gives at the tokens' own positions (never a landmark's), and at last the whole
            ``last_hidden_state``.
        chunk_indices: per group (B, N, K), what each of the N chunks that closed in this pass retrieved; -1 for an
            empty slot. Only with ``output_retrieval=True``.
        chunk_weights: per group (B, N, K) float32, the weights of those chunks.
        retrieval_loss: 0-d, with ``retrieval_targets``: cross-entropy of the retrieval scores with the chunks that are
            known to be right, the mean over groups.
        retrieval_recall: 0-d, with ``retrieval_targets``: share of the right chunks that were selected.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    chunk_indices: tuple[Tensor, ...] | None = None
    chunk_weights: tuple[Tensor, ...] | None = None
    retrieval_loss: Tensor | None = None
    retrieval_recall: Tensor | None = None


@dataclass
class DRTCausalLMOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` with the retrieval records of `DRTModelOutput`."""

    chunk_indices: tuple[Tensor, ...] | None = None
    chunk_weights: tuple[Tensor, ...] | None = None
    retrieval_loss: Tensor | None = None
    retrieval_recall: Tensor | None = None
