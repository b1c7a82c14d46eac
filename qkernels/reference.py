"""The public functions in pure torch, whatever the device and dtype: what the kernels are compared with.

Each is the function of the same name with `backend="torch"`; use float64 logits for the truth.
"""

from __future__ import annotations

from functools import partial

from . import functional, linear, mdp

fused_token_dpo = partial(functional.fused_token_dpo, backend="torch")
fused_linear_token_dpo = partial(linear.fused_linear_token_dpo, backend="torch")
linear_token_logps = partial(linear.linear_token_logps, backend="torch")
linear_token_stats = partial(linear.linear_token_stats, backend="torch")
token_logps = partial(functional.token_logps, backend="torch")
token_stats = partial(functional.token_stats, backend="torch")
token_mdp = partial(mdp.token_mdp, backend="torch")
