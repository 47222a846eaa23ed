"""The sliding-window language model, registered with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from drt.models.window.configuration_window import WindowConfig
from drt.models.window.modeling_window import WindowForCausalLM, WindowModel

AutoConfig.register(WindowConfig.model_type, WindowConfig, exist_ok=True)
AutoModel.register(WindowConfig, WindowModel, exist_ok=True)
AutoModelForCausalLM.register(WindowConfig, WindowForCausalLM, exist_ok=True)

__all__ = ["WindowConfig", "WindowForCausalLM", "WindowModel"]
