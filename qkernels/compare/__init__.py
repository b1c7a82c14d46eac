"""`qkernels compare`: per-token log-probs of a rollout engine beside a trainer's, and how far apart they are.

rollouts.py    files of token ids with log-probs
agreement.py   the figures
run.py         from files and a model to a folder;  options.py, page.py
"""

from .agreement import Agreement, agreement
from .options import CompareError, CompareOptions
from .run import run_compare

__all__ = ["Agreement", "CompareError", "CompareOptions", "agreement", "run_compare"]
