"""Models; importing this package registers them with the Auto classes of transformers."""

from drt.models import drt

__all__ = ["drt"]
