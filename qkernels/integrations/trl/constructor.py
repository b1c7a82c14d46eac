"""What is replaced in TRL while the constructor of its DPOTrainer runs for `TokenDPOTrainer`. Imports TRL.

`DPOTrainer.__init__` makes its head, collator and reference model by functions and classes that it takes from its
module, `trl.trainer.dpo_trainer`. Each function here replaces one of them, and says which; line numbers are those of
TRL 1.16.0. The module has its own again when the constructor ends, also by an exception.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from trl.trainer import dpo_trainer

from .collator import TokenPreferenceCollator
from .head import add_token_head
from .patch import Patch, allow_adapter_on_head


@contextlib.contextmanager
def patched_constructor(
    args: Any, *, head_options: Mapping[str, Any], skip_reference: bool, policy_is_path: bool
) -> Iterator[None]:
    """All replacements, for a block that calls `DPOTrainer.__init__`.

    Args:
        args: the trainer's configuration.
        head_options: keyword arguments of `add_token_head`.
        skip_reference: load no reference model.
        policy_is_path: whether the constructor loads the policy.
    """
    with Patch() as patch:
        use_token_head(patch, head_options)
        use_token_collator(patch, packed=bool(args.padding_free))
        allow_adapter_on_head(patch, dpo_trainer)
        if args.padding_free:
            hide_padding_free(patch, args)
        if skip_reference:
            skip_reference_model(patch, policy_is_path)
        yield


def use_token_head(patch: Patch, head_options: Mapping[str, Any]) -> None:
    """Put this package's head on policy and reference.

    Stands for `add_fused_lm_head(self.model, outputs=outputs)` and `add_fused_lm_head(self.ref_model)`, lines 960-962.
    """
    patch.set(dpo_trainer, "add_fused_lm_head", functools.partial(add_token_head, **head_options))


def use_token_collator(patch: Patch, packed: bool) -> None:
    """Make the collator that also takes numbers for tokens.

    Stands for `data_collator = DataCollatorForPreference(...)`, line 793, which is made unless one is passed.
    """
    collator = functools.partial(TokenPreferenceCollator, packed=packed)
    patch.set(dpo_trainer, "DataCollatorForPreference", collator)


def hide_padding_free(patch: Patch, args: Any) -> None:
    """Keep TRL from saying that it does not pack: `TokenPreferenceCollator` does.

    Stands for the warning of `if self.padding_free:`, lines 732-739.
    """
    patch.set(args, "padding_free", False)


def skip_reference_model(patch: Patch, policy_is_path: bool) -> None:
    """Load no reference model, which TRL would do for any loss.

    Stands for `self.ref_model = create_model_from_path(...)`, line 927. Line 574 calls the same function before, for a
    policy that is given by its name or path; that call goes through.
    """
    load = dpo_trainer.create_model_from_path
    policy_is_loaded = not policy_is_path

    def load_policy_only(*args: Any, **kwargs: Any) -> Any:
        nonlocal policy_is_loaded
        if policy_is_loaded:
            return None
        policy_is_loaded = True
        return load(*args, **kwargs)

    patch.set(dpo_trainer, "create_model_from_path", load_policy_only)
