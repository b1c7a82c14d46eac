"""`qkernels judge`: how often one model's answers are better than another's, with both orders of the two answers.

    from qkernels.judge import Verdict, win_rate

Importing this package does not import transformers.
"""

from .judges import JUDGE_TEMPLATE, ModelJudge
from .options import JudgeError, JudgeOptions
from .run import run_judge
from .statistics import Verdict, WinRate, win_rate

__all__ = [
    "JUDGE_TEMPLATE",
    "JudgeError",
    "JudgeOptions",
    "ModelJudge",
    "Verdict",
    "WinRate",
    "run_judge",
    "win_rate",
]
