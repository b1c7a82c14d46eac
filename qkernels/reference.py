"""The public functions in pure torch, whatever the device and dtype: what the kernels are compared with.

Each is the function of the same name with `backend="torch"`; use float64 logits for the truth.
"""

from __future__ import annotations

from functools import partial

from . import functional, mdp

fused_token_dpo = partial(functional.fused_token_dpo, backend="torch")
token_logps = partial(functional.token_logps, backend="torch")
token_stats = partial(functional.token_stats, backend="torch")
token_mdp = partial(mdp.token_mdp, backend="torch")
