"""Blocks shared by the models: ``nn.Module`` over the functions of ``drt.ops``."""
