"""Models; importing this package registers them with the Auto classes of transformers."""

from drt.models import block_recurrent, drt, full_attention, landmark, window

__all__ = ["block_recurrent", "drt", "full_attention", "landmark", "window"]
