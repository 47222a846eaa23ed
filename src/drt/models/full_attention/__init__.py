"""The full-attention language model, registered with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from drt.models.full_attention.configuration_full_attention import FullAttentionConfig
from drt.models.full_attention.modeling_full_attention import FullAttentionForCausalLM, FullAttentionModel

AutoConfig.register(FullAttentionConfig.model_type, FullAttentionConfig, exist_ok=True)
AutoModel.register(FullAttentionConfig, FullAttentionModel, exist_ok=True)
AutoModelForCausalLM.register(FullAttentionConfig, FullAttentionForCausalLM, exist_ok=True)

__all__ = ["FullAttentionConfig", "FullAttentionForCausalLM", "FullAttentionModel"]
