"""Answers that depend on a model's weights and on the call alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

# Of a generation_config, what is not about which tokens are taken.
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "cache_implementation", "use_cache")


@contextlib.contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """A context in which a model has none of the penalties, truncations and forbidden tokens of its generation_config.

    transformers fills from it whatever a call of `generate` leaves out. Where models are compared, or one is sampled
    from, that would be another distribution than the model's.

    Args:
        model: of transformers, with `generate`.
    """
    own = model.generation_config
    model.generation_config = type(own)(**{name: getattr(own, name) for name in _KEPT if hasattr(own, name)})
    try:
        yield
    finally:
        model.generation_config = own
