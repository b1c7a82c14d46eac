"""Preference losses: the formulas, their names and options, and what they see of a batch.

`formulas.py` holds every loss once. `scores.py` has what a loss is a function of, `units.py` what one entry of it
depends on, `registry.py` the names and options, `learned_link.py` the two losses that learn their link from one step to
the next.
"""

from . import formulas as formulas  # registers every loss
from .learned_link import OSPO, PSPO, LearnedLink, isotonic_fit
from .policy import POLICY_OBJECTIVES, PolicyObjective, PolicyScores
from .registry import OBJECTIVES, STATEFUL, LossSpec, LossType, Objective, create, for_run, objective, resolve, stateful
from .scores import F_DIVERGENCES, PairScores
from .units import UNITS, declare_unit
from .unpaired import SEQUENCE_OBJECTIVES, SequenceObjective, SequenceScores

# The functions themselves, `objectives.sigmoid` and so on, may be passed as `loss_type`.
globals().update({name: term.function for name, term in OBJECTIVES.items()})

__all__ = [
    "F_DIVERGENCES",
    "OBJECTIVES",
    "OSPO",
    "POLICY_OBJECTIVES",
    "PSPO",
    "SEQUENCE_OBJECTIVES",
    "STATEFUL",
    "UNITS",
    "LearnedLink",
    "LossSpec",
    "LossType",
    "Objective",
    "PairScores",
    "PolicyObjective",
    "PolicyScores",
    "SequenceObjective",
    "SequenceScores",
    "create",
    "declare_unit",
    "for_run",
    "isotonic_fit",
    "objective",
    "resolve",
    "stateful",
]
