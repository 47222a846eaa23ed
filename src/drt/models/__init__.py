"""Models; importing this package registers them with the Auto classes of transformers."""

from drt.models import drt, full_attention, landmark, window

__all__ = ["drt", "full_attention", "landmark", "window"]
