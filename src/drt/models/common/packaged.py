"""Saved folders that tools can load: they name the package that holds the model's code, and copy none of it."""

# No `from __future__ import annotations`: it makes annotations strings, whose fields @strict does not check.

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from drt.files import write_text

AUTO_MODULE = "modeling_drt_lm"
# The library looks for missing packages in imports outside of `try`, and would tell users to install `drt`, which is
# another project on the package index.
_AUTO_CODE = '''"""The model's code is in the package drt-lm (pip install drt-lm), which is imported as drt."""

try:
    from {package} import {names}
except ImportError as error:
    raise ImportError("this checkpoint needs the package drt-lm: pip install drt-lm") from error

__all__ = {quoted}
'''


class PackagedCode:
    """A class whose code is in this package, wherever a model was loaded from; goes before the library's base class."""

    @classmethod
    def is_packaged(cls) -> bool:
        """Whether the class is this package's, and not a user's own one derived from it."""
        return cls.__module__.partition(".")[0] == __name__.partition(".")[0]

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """For a user's own class as in the library. For ours nothing: their code is not copied into saved folders."""
        if not cls.is_packaged():
            super().register_for_auto_class(*args, **kwargs)  # type: ignore[misc]  # of the library's base class


@strict
class PackagedConfig(PackagedCode, PreTrainedConfig):
    """A configuration whose saved folder the Auto classes can load.

    Where this package is installed, but not imported, they want ``trust_remote_code=True``.
    """

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save config.json and the module that the Auto classes import the model's classes from."""
        if not self.is_packaged():
            super().save_pretrained(save_directory, push_to_hub, **kwargs)
            return
        prefix = type(self).__name__.removesuffix("Config")
        names = {
            "AutoConfig": f"{prefix}Config",
            "AutoModel": f"{prefix}Model",
            "AutoModelForCausalLM": f"{prefix}ForCausalLM",
        }
        self.auto_map = {auto_class: f"{AUTO_MODULE}.{name}" for auto_class, name in names.items()}
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        package = type(self).__module__.rpartition(".")[0]
        listed = sorted(names.values())
        code = _AUTO_CODE.format(package=package, names=", ".join(listed), quoted=json.dumps(listed))
        write_text(Path(save_directory) / f"{AUTO_MODULE}.py", code)
