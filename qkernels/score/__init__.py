"""`qkernels score`: a model's own rewards, values and divergences for every token of a preference set.

    from qkernels.score import score_preferences

Importing this package imports neither transformers nor pyarrow nor pandas.
"""

from .encode import EncodedAnswer, Encoder
from .options import ScoreError, ScoreOptions
from .run import run_score, score_preferences
from .store import read_scores
from .table import TokenTable
from .tokens import DEFAULT_OUTPUTS, OUTPUTS, Answer, TokenScorer

__all__ = [
    "DEFAULT_OUTPUTS",
    "OUTPUTS",
    "Answer",
    "EncodedAnswer",
    "Encoder",
    "ScoreError",
    "ScoreOptions",
    "TokenScorer",
    "TokenTable",
    "read_scores",
    "run_score",
    "score_preferences",
]
