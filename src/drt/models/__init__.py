"""Models; importing this package registers them with the Auto classes of transformers."""

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from drt.models import block_recurrent, drt, full_attention, landmark, window

# Trainers shift labels, and pipelines know what they can run, by this table of class names.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES |= {
    "block_recurrent": "BlockRecurrentForCausalLM",
    "drt": "DRTForCausalLM",
    "full_attention": "FullAttentionForCausalLM",
    "landmark": "LandmarkForCausalLM",
    "window": "WindowForCausalLM",
}

__all__ = ["block_recurrent", "drt", "full_attention", "landmark", "window"]
