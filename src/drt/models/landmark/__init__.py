"""The Landmark Attention language model, registered with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from drt.models.landmark.configuration_landmark import LandmarkConfig
from drt.models.landmark.modeling_landmark import LandmarkForCausalLM, LandmarkModel

AutoConfig.register(LandmarkConfig.model_type, LandmarkConfig, exist_ok=True)
AutoModel.register(LandmarkConfig, LandmarkModel, exist_ok=True)
AutoModelForCausalLM.register(LandmarkConfig, LandmarkForCausalLM, exist_ok=True)

__all__ = ["LandmarkConfig", "LandmarkForCausalLM", "LandmarkModel"]
