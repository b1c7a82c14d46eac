"""Losses that learn their link, in a trainer: their state in checkpoints, their fits to the whole data set, their sign.

A learned link (`qkernels.semiparametric`) has a memory, which each process keeps for its own pairs. So each process
writes a file of its own beside the optimizer's state, and a run that is resumed goes on as if it had not stopped.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from ...objectives import PSPO, LearnedLink, LossSpec


def learned_links(loss: LossSpec) -> list[LearnedLink]:
    """The losses of a run that learn their link, in order."""
    return [term.function for term, _, _ in loss.terms if isinstance(term.function, LearnedLink)]


def _file(folder: str, rank: int) -> str:
    return os.path.join(folder, f"loss_state_{rank}.pt")


def save_links(links: list[LearnedLink], folder: str, rank: int) -> None:
    """Write what a run that goes on from this checkpoint must know."""
    if links:
        os.makedirs(folder, exist_ok=True)
        torch.save([link.state_dict() for link in links], _file(folder, rank))


def load_links(links: list[LearnedLink], folder: str, rank: int) -> None:
    """Go on from `save_links`; a checkpoint without the file is announced, and one of other losses an error.

    Raises:
        ValueError: the checkpoint is of a run with another number of such losses.
    """
    if not links:
        return
    path = _file(folder, rank)
    if not os.path.exists(path):
        warnings.warn(
            f"{path} is not there (the checkpoint is of another loss, another number of processes or an earlier"
            f" version): {', '.join(type(link).__name__ for link in links)} begins with an empty memory, as plain DPO",
            stacklevel=2,
        )
        return
    states = torch.load(path, map_location="cpu", weights_only=True)
    if len(states) != len(links):
        raise ValueError(f"{path} is of {len(states)} losses with a memory, and loss_type has {len(links)}")
    for link, state in zip(links, states, strict=True):
        link.load_state_dict(state)


class DataPass:
    """Batches of the whole data set in its order, for fits of a link to it. Draws no random numbers.

    Args:
        dataset: of the trainer, with a length.
        trainer: whose collator, batch size and accelerator are used.
    """

    def __init__(self, dataset: Any, trainer: Any):
        self._length = len(dataset)
        loader = DataLoader(
            dataset,
            batch_size=trainer.args.per_device_eval_batch_size,
            collate_fn=trainer.data_collator,
            shuffle=False,
            generator=torch.Generator(),
        )
        self._accelerator = trainer.accelerator
        self._loader = self._accelerator.prepare_data_loader(loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def fit(self, link: PSPO, passes: Iterable[None]) -> None:
        """Fit a link to the t of all pairs of all processes. `passes` runs the loss on the batches one by one."""
        with link.collecting() as seen:
            for _ in passes:
                pass
        t = self._accelerator.gather(torch.cat(seen).to(self._accelerator.device))
        link.fit_to(t[: self._length] if len(t) > self._length else t)


def warn_of_wrong_signs(links: list[LearnedLink]) -> None:
    """Say after training which link has found the rewards upside down."""
    for link in links:
        if link.sign < 0:
            warnings.warn(
                f"{type(link).__name__}: the implicit rewards of chosen answers are below those of rejected ones, so"
                " the policy has learnt the reward with the wrong sign: use it with"
                " qkernels.search.scan_beta(..., sign=-1), or train again with a longer warm_up",
                stacklevel=3,
            )
