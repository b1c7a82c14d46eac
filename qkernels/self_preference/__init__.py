"""Preference data that a model makes for itself, and training on it: sample, judge, keep best and worst, DPO, again.

    from qkernels.self_preference import build_pairs, improve

"Your language model is secretly a preference classifier" (Garg et al. 2025): for each prompt the model writes several
answers, its own Yes or No scores them (`qkernels.preference_classifier`), the best becomes `chosen`, the worst
`rejected`, and DPO trains on these pairs. The paper trains once; `improve` goes on with the trained model as author
and judge of the next round.

    options.py  the error, settings and their checks
    pairs.py    build_pairs: samples, scores, one pair per prompt, a file that can be gone on with
    rounds.py   improve: rounds of pairs and training, a folder that can be gone on with
    files.py    prompts of a file; lines and folders that a stopped run leaves

Importing this package imports neither transformers nor TRL.
"""

from .files import Prompt, read_prompts
from .options import SelfPreferenceError
from .pairs import Pairs, build_pairs
from .rounds import Improvement, Round, improve, train_dpo

__all__ = [
    "Improvement",
    "Pairs",
    "Prompt",
    "Round",
    "SelfPreferenceError",
    "build_pairs",
    "improve",
    "read_prompts",
    "train_dpo",
]
