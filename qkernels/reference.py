"""The public functions in pure torch, whatever the device and dtype: what the kernels are compared with.

Each is the function of the same name with `backend="torch"`; use float64 logits for reference values.
"""

from __future__ import annotations

from functools import partial

from .functional import hidden, logits, mdp

fused_token_dpo = partial(logits.fused_token_dpo, backend="torch")
fused_linear_token_dpo = partial(hidden.fused_linear_token_dpo, backend="torch")
linear_token_logps = partial(hidden.linear_token_logps, backend="torch")
linear_token_stats = partial(hidden.linear_token_stats, backend="torch")
token_logps = partial(logits.token_logps, backend="torch")
token_stats = partial(logits.token_stats, backend="torch")
token_mdp = partial(mdp.token_mdp, backend="torch")
