r"""What a step of training draws: images, mirrorings, timesteps, dropped labels and noise.

All of it is a pure function of (seed, step), so that a run can go on anywhere, in any number of
processes. Image number k of the run, k = step B + i, has the noise key k; its words are

    t      = floor(w T 2^-32),     w = word(TIMESTEP, key k)                       uniform
                                   w = word(TIMESTEP, key step) + i 2^32 / B       low_discrepancy
    label dropped, image mirrored  where word(LABEL_DROPOUT or FLIP, key k) is small

(low discrepancy: Kingma et al. 2021, appendix I.1: the timesteps of a batch are evenly spread, and
each is uniform). Every epoch is a permutation of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashddpm import arguments
from flashddpm.host import ints
from flashddpm.kernels import reference
from flashddpm.kernels.tables import Purpose
from flashddpm.training.config import TrainConfig
from flashddpm.training.loader import Draw

WORD = 2**32


class Draws:
    """``draws(step)`` is what this process trains on in a step.

    Args:
        config: of the run.
        count: images of the data.
        rank, size: the part of every batch, ``rank`` of ``size`` equal ones, that is drawn.
    """

    def __init__(self, config: TrainConfig, count: int, rank: int = 0, size: int = 1) -> None:
        self.config, self.count = config, count
        self.rank, self.size = rank, size
        self.seed = arguments.seed_list(config.seed)[0]
        self._last = (-1, ints([]))

    def __call__(self, step: int) -> Draw:
        """Return what a step trains on, on the CPU, each [b]:

        index of the images int64, which are mirrored bool, and as ``extra``: ``t`` int64, ``seeds``
        and ``keys`` of the noise int64, ``drop``, whose labels are dropped, bool.
        """
        config, B = self.config, self.config.batch_size
        part = config.part_of(self.size)
        places = torch.arange(self.rank * part, (self.rank + 1) * part, device="cpu")
        keys = step * B + places
        if config.timestep_sampling == "uniform":
            word = self._words(keys, Purpose.TIMESTEP)
        else:
            start = self._words(ints([step]), Purpose.TIMESTEP)
            word = (start + (places << 32) // B) % WORD
        # float32, in which torch compares integers with a fraction where no dtype is set.
        dropout = self._words(keys, Purpose.LABEL_DROPOUT).float()
        return Draw(
            index=self._images(keys),
            flip=(self._words(keys, Purpose.FLIP) < WORD // 2) & config.horizontal_flip,
            extra={
                "t": (word * config.num_train_timesteps) >> 32,
                "seeds": torch.full_like(keys, self.seed),
                "keys": keys,
                "drop": dropout < config.label_dropout * WORD,
            },
        )

    def _words(self, keys: Tensor, purpose: Purpose) -> Tensor:
        """Return 32 bits of counted noise for each key, int64 [B]."""
        seeds = torch.full_like(keys, self.seed)
        return reference.philox_words(seeds, keys, purpose, 1)[0][:, 0]

    def _images(self, keys: Tensor) -> Tensor:
        """Return the index of each image of the run."""
        epochs, places = keys // self.count, keys % self.count
        index = torch.empty_like(keys)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            index[here] = self._permutation(epoch)[places[here]]
        return index

    def _permutation(self, epoch: int) -> Tensor:
        known, order = self._last  # read and set as one: a loader's thread may draw beside us
        if known != epoch:
            seed = (self.config.seed + epoch * 0x9E3779B9) % 2**63
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(self.count, generator=generator, device="cpu")
            self._last = (epoch, order)
        return order
