"""The model's code is in the package drt-lm (pip install drt-lm), which is imported as drt."""

try:
    from drt.models.drt import DRTConfig, DRTForCausalLM, DRTModel
except ImportError as error:
    raise ImportError("this checkpoint needs the package drt-lm: pip install drt-lm") from error

__all__ = ["DRTConfig", "DRTForCausalLM", "DRTModel"]
