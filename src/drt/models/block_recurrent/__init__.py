"""The Block-Recurrent Transformer, registered with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from drt.models.block_recurrent.configuration_block_recurrent import BlockRecurrentConfig
from drt.models.block_recurrent.modeling_block_recurrent import BlockRecurrentForCausalLM, BlockRecurrentModel

AutoConfig.register(BlockRecurrentConfig.model_type, BlockRecurrentConfig, exist_ok=True)
AutoModel.register(BlockRecurrentConfig, BlockRecurrentModel, exist_ok=True)
AutoModelForCausalLM.register(BlockRecurrentConfig, BlockRecurrentForCausalLM, exist_ok=True)

__all__ = ["BlockRecurrentConfig", "BlockRecurrentForCausalLM", "BlockRecurrentModel"]
