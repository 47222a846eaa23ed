"""What `generate` must know of models that have a cache of their own."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import GenerationMixin, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

PREFILL_CHUNK_SIZE = 8192  # tokens of a pass over a prompt, so that its memory does not grow with the prompt


class EndedRows(StoppingCriteriaList):
    """The stopping criteria of a call, and which rows they have ended: those are fed padding from then on.

    Attributes:
        padding: (B,) bool, rows whose last token is padding; ``None`` before there can be any.
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        super().__init__(criteria)
        self.padding: Tensor | None = None
        self._ended: Tensor | None = None
        # What the library makes its own padding by: without an end token all rows go on in earnest.
        self._pads = any(hasattr(one, "eos_token_id") for one in criteria)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        if self._pads:
            self.padding, self._ended = self._ended, done if self._ended is None else self._ended | done
        return done


class OwnCacheGenerationMixin(GenerationMixin):
    """`generate` with the model's own cache, copying nothing that grows with the text for every token.

    It goes before the library's base class: a model's generation configuration begins with `generation_defaults`.
    """

    cache_class: ClassVar[type[Cache]]

    def generation_defaults(self) -> dict[str, Any]:
        """Fields of the generation configuration that a new model has."""
        return {"prefill_chunk_size": PREFILL_CHUNK_SIZE}

    def post_init(self) -> None:
        """End of the model's constructor."""
        super().post_init()  # type: ignore[misc]  # of PreTrainedModel
        self.generation_config.update(**self.generation_defaults(), allow_custom_entries=True)
        self.generation_config._from_model_config = (
            False  # else fields that the library lacks are lost on loading
        )

    def make_cache(self) -> Cache:
        """An empty cache."""
        raise NotImplementedError

    def closes_prompt(self, wanted: bool | None = None, generation_config: Any = None) -> bool:
        """Whether `generate` closes the open chunk at the end of a prompt; False where a model has no such chunks.

        Args:
            wanted: its argument ``close_prompt``, ``None`` where that is not given.
            generation_config: the one in use. Default: the model's.
        """
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """`generate` would build a DynamicCache: give it ours."""
        cache = model_kwargs.get("past_key_values")
        if cache is not None and not isinstance(cache, self.cache_class):
            raise ValueError(
                f"past_key_values must be a {self.cache_class.__name__}, got {type(cache).__name__}"
            )
        if generation_config.use_cache is not False and cache is None:
            if generation_config.cache_implementation is not None:
                raise ValueError(
                    f"the model has a cache of its own; cache_implementation must be None, got "
                    f"{generation_config.cache_implementation!r}"
                )
            model_kwargs["past_key_values"] = self.make_cache()
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Read a prompt in slices only where there is a cache to read it into, and more than one slice.

        Where somebody has put a function of their own in the place of `prepare_inputs_for_generation`, a prompt is read
        at once: that of PEFT's prompt tuning loses all but the last token of a second slice.
        """
        mask = model_kwargs.get("attention_mask")
        if mask is not None and bool((mask[:, -1] == 0).any()):
            raise ValueError(
                "generate goes on where a prompt ends: attention_mask must be left padding (zeros, then ones), got a "
                'row that ends in zeros. Pad on the left: tokenizer.padding_side = "left"'
            )
        size = generation_config.prefill_chunk_size
        own = "prepare_inputs_for_generation" not in vars(self)
        slices = own and model_kwargs.get("past_key_values") is not None
        slices = slices and model_kwargs.get("inputs_embeds") is None
        if size is not None and not (slices and input_ids.shape[1] > size):
            generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc,arg-type]

    def _sample(  # type: ignore[override]
        self, input_ids: Tensor, logits_processor: Any, stopping_criteria: StoppingCriteriaList, **kwargs: Any
    ) -> Any:
        """Keep count of the rows that have ended: what they are fed must not be remembered as text."""
        ended = EndedRows(stopping_criteria)
        return super()._sample(input_ids, logits_processor, ended, ended_rows=ended, **kwargs)  # type: ignore[misc,arg-type]

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        ended_rows: EndedRows | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Slice the inputs; say which rows' next token is padding."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,  # type: ignore[arg-type]
            *args,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        padding = None if ended_rows is None else ended_rows.padding
        if padding is not None and inputs.get("past_key_values") is not None and bool(padding.any()):
            inputs["ended_rows"] = padding
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Drop what says nothing of the tokens to come: the library would copy it whole for every token of a text."""
        if outputs.get("past_key_values") is not None:
            for name in ("attention_mask", "position_ids"):
                model_kwargs.pop(name, None)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
