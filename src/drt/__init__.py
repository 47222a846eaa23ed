"""Language models that read millions of tokens with a constant attention window and learned chunk retrieval."""

from drt.registration import register

__version__ = "0.1.0"

register()
