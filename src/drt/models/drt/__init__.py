"""The Differentiable Retrieval-based Transformer, registered with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from drt.models.drt.cache_drt import DRTCache
from drt.models.drt.configuration_drt import DRTConfig
from drt.models.drt.modeling_drt import DRTForCausalLM, DRTModel

AutoConfig.register(DRTConfig.model_type, DRTConfig, exist_ok=True)
AutoModel.register(DRTConfig, DRTModel, exist_ok=True)
AutoModelForCausalLM.register(DRTConfig, DRTForCausalLM, exist_ok=True)

__all__ = ["DRTCache", "DRTConfig", "DRTForCausalLM", "DRTModel"]
