r"""`Draws`: the random choices of a training run: images, flips, timesteps, dropped labels, keys.

Each choice is a pure function of the run's seed and of an image's key k = step B + i, its number in
the run, i being its place in the batch of B. So a run can be resumed anywhere, in any number of
processes. With word(p, k) 32 bits of counted noise (Philox) of purpose p and key k,

    t            = floor(w T 2^-32),  w = word(TIMESTEP, k)                          uniform
                                      w = word(TIMESTEP, step) + i 2^32 / B mod 2^32 low_discrepancy
    label drops    where word(LABEL_DROPOUT, k) < label_dropout 2^32
    image flips    where word(FLIP, k) < 2^31

(low discrepancy: Kingma et al. 2021, appendix I.1: the timesteps of a batch are evenly spread, and
each is uniform). The images of an epoch are a permutation of the data, another one each epoch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashddpm import arguments
from flashddpm.host import ints
from flashddpm.kernels import reference
from flashddpm.kernels.tables import Purpose
from flashddpm.training.config import TrainConfig

WORD = 2**32


class Draws:
    """Draws the random choices of a training run, each as a pure function of seed and key.

    ``keys(step)`` returns the keys of a step's images: a key is an image's number in the run, and
    the upper 64 bits of its noise counter. Every other method takes keys, int64 [n] on the CPU, and
    returns a CPU tensor of n entries, one for each key.

    Args:
        config: the settings of the run; batch_size, accumulate and seed, and those of flips,
            timesteps and label dropout, are read.
        count: the number of images in the data, at least 1 (not checked).
        rank: the number of this process, 0..size-1 (not checked).
        size: the number of processes; each draws an equal part of every batch.

    Attributes:
        config, count, rank, size: the arguments.
        seed: the seed of the run as a signed 64-bit int.
    """

    def __init__(self, config: TrainConfig, count: int, rank: int = 0, size: int = 1) -> None:
        self.config, self.count = config, count
        self.rank, self.size = rank, size
        self.seed = arguments.seed_list(config.seed)[0]
        self._last = (-1, ints([]))

    def keys(self, step: int) -> Tensor:
        """Return the keys of this process's images in a step, int64 [batch_size / size] on the CPU.

        They are consecutive: the whole batch has step batch_size to (step + 1) batch_size - 1.

        Args:
            step: the number of the step, from 0 (not checked).

        Raises:
            ValueError: if batch_size is not a multiple of the number of processes times accumulate.
        """
        part = self.config.part_of(self.size)
        first = step * self.config.batch_size + self.rank * part
        return torch.arange(first, first + part, device="cpu")

    def seeds(self, keys: Tensor) -> Tensor:
        """Return the seed of each image's noise, int64 [n]: the run's seed for all.

        Args:
            keys: int64 [n] on the CPU, the images' numbers in the run, as `keys` returns them.
        """
        return torch.full_like(keys, self.seed)

    def index(self, keys: Tensor) -> Tensor:
        """Return the index of each image in the data, int64 [n] in 0..count-1.

        Each epoch (``count`` consecutive keys) goes through a permutation of the data of its own.

        Args:
            keys: int64 [n] on the CPU, the images' numbers in the run, as `keys` returns them.
        """
        epochs, places = keys // self.count, keys % self.count
        index = torch.empty_like(keys)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            index[here] = self._permutation(epoch)[places[here]]
        return index

    def flips(self, keys: Tensor) -> Tensor:
        """Return which images are mirrored left to right, bool [n].

        With ``horizontal_flip`` each is, with probability 1/2; otherwise none is.

        Args:
            keys: int64 [n] on the CPU, the images' numbers in the run, as `keys` returns them.
        """
        return (self._words(keys, Purpose.FLIP) < WORD // 2) & self.config.horizontal_flip

    def timesteps(self, keys: Tensor) -> Tensor:
        """Return the timestep of each image, int64 [n] in 0..T-1.

        Args:
            keys: int64 [n] on the CPU, the images' numbers in the run, as `keys` returns them; with
                low_discrepancy sampling all are of one step, n at least 1.
        """
        config, B = self.config, self.config.batch_size
        if config.timestep_sampling == "uniform":
            words = self._words(keys, Purpose.TIMESTEP)
        else:
            starts = self._words(keys[:1] // B, Purpose.TIMESTEP)  # all keys are of one step
            words = (starts + (keys % B << 32) // B) % WORD
        return (words * config.num_train_timesteps) >> 32

    def label_drops(self, keys: Tensor) -> Tensor:
        """Return which images have their label replaced by the null class, bool [n].

        Each has, with probability ``label_dropout``; classifier-free guidance needs such training.

        Args:
            keys: int64 [n] on the CPU, the images' numbers in the run, as `keys` returns them.
        """
        # float32, in which torch compares integers with a fraction where no dtype is set.
        words = self._words(keys, Purpose.LABEL_DROPOUT).float()
        return words < self.config.label_dropout * WORD

    def _words(self, keys: Tensor, purpose: Purpose) -> Tensor:
        """Return 32 bits of counted noise for each key, int64 [B] in 0..2^32-1."""
        seeds = torch.full_like(keys, self.seed)
        return reference.philox_words(seeds, keys, purpose, 1)[0][:, 0]

    def _permutation(self, epoch: int) -> Tensor:
        """Return the order of the data in an epoch (counted from 0), int64 [count]."""
        known, order = self._last  # read and set as one: a loader's thread may draw beside us
        if known != epoch:
            seed = (self.config.seed + epoch * 0x9E3779B9) % 2**63
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(self.count, generator=generator, device="cpu")
            self._last = (epoch, order)
        return order
