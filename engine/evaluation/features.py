"""Feature extractors: functions from images to feature vectors, checked, with a cache on disk.

extractor = Features.of_classifier(classifier)
extractor = Features.of_torchscript("inception.pt", "uint8")
features = features_of(images, extractor)            # float32 [N, D]
features = cached_features(images, extractor)        # the same, read back the next time

Images are a tensor in memory, or fetched by number from a data source. There are N images or, in a
batch, B; an image has D features.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from flashddpm import arguments
from flashddpm.data import ImageSource, to_float
from flashddpm.errors import CheckpointError
from flashddpm.evaluation.classifier import Classifier
from flashddpm.execution import compile_cache
from flashddpm.host import isolated
from flashddpm.io.files import read_tensors, require_file, write_atomic

log = logging.getLogger("flashddpm")

INPUTS = ("uint8", "float")
BATCH = 256

Images = Tensor | ImageSource
"""Images: a tensor uint8 [N, C, H, W], or an ``ImageSource`` of N such images."""


def fetch(images: Images, start: int, stop: int) -> Tensor:
    """Return the images start..stop-1, uint8 [B, C, H, W] on the CPU.

    Args:
        images: a tensor uint8 [N, C, H, W], or a data source.
        start: the number of the first image, from 0.
        stop: the number after that of the last image, at most N (more is cut off for a tensor and
            refused by a data source).

    Raises:
        ValueError: if the images are not uint8 or not of four dimensions.
        DataError: if a data source cannot read an image.
    """
    if isinstance(images, Tensor):
        part = images[start:stop]
    else:
        part, _ = images.fetch(torch.arange(start, stop, device="cpu"))
    if part.ndim != 4 or part.dtype is not torch.uint8:
        raise ValueError(
            f"images of shape {tuple(part.shape)}, {part.dtype}: must be uint8 [N, C, H, W]"
        )
    return part.cpu()


@dataclass(frozen=True)
class Features:
    """A feature extractor: a function of images, with a name and a fingerprint.

    Attributes:
        function: called with uint8 [B, C, H, W] on ``device``; returns floating-point [B, D], on
            any device.
        name: the name in reports, progress bars and errors.
        fingerprint: a string, equal for extractors that give equal features, by which they are
            cached.
        device: the device on which images are handed to the function.
    """

    function: Callable[[Tensor], Tensor]
    name: str
    fingerprint: str
    device: torch.device = torch.device("cpu")

    @isolated(grad=False)
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of images, float32 [B, D] on the CPU.

        Args:
            images: uint8 [B, C, H, W], on any device.

        Raises:
            ValueError: if the function fails on these images, or returns anything but one finite
                floating-point tensor [B, D] with D at least 1.
            torch.OutOfMemoryError: if the GPU's memory does not suffice.
        """
        try:
            found = self.function(images.to(self.device))
        except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"features {self.name}: failed on {images.dtype} images of shape "
                f"{tuple(images.shape)}: {error}"
            ) from error
        wanted = f"must be one floating-point tensor [{len(images)}, D]"
        if not isinstance(found, Tensor):
            raise ValueError(f"features {self.name}: gave a {type(found).__name__}; {wanted}")
        if found.ndim != 2 or len(found) != len(images) or not found.shape[1]:
            raise ValueError(f"features {self.name}: gave shape {tuple(found.shape)}; {wanted}")
        if not found.is_floating_point():
            raise ValueError(f"features {self.name}: gave {found.dtype}; {wanted}")
        found = found.float().cpu()
        rows = (~found.isfinite()).any(1).nonzero()
        if len(rows):
            raise ValueError(
                f"features {self.name}: NaN or infinite for {len(rows)} of {len(images)} images, "
                f"the first in row {int(rows[0])}; must be finite"
            )
        return found

    @classmethod
    @isolated
    def of_classifier(
        cls, classifier: Classifier, name: str = "classifier", device: str = "cpu"
    ) -> Features:
        """Return the extractor of the classifier's 64 features, the input of its last layer.

        Args:
            classifier: the classifier, which is set to evaluation mode and moved to the device.
            name: the name of the extractor.
            device: "cpu", "cuda", "cuda:N", or "auto" for CUDA where there is a GPU, else the CPU.

        Raises:
            ValueError: if there is no such device.
        """
        where = arguments.resolve_device(device)
        classifier = classifier.eval().to(where)
        return cls(classifier.features, name, _fingerprint(classifier, "features"), where)

    @classmethod
    @isolated
    def of_module(
        cls, module: nn.Module, name: str, images: str = "uint8", device: str = "cpu"
    ) -> Features:
        """Return an extractor whose features are the output of a module.

        The fingerprint covers the module's class and its source, the name, parameters and buffers,
        and no other attribute: give modules that differ in other attributes different names.

        Args:
            module: called with images [B, C, H, W], returns floating-point [B, D]; it is set to
                evaluation mode and moved to the device.
            name: the name of the extractor.
            images: what the module is called with: "uint8", or "float" (float32 in [-1, 1]).
            device: "cpu", "cuda", "cuda:N", or "auto" for CUDA where there is a GPU, else the CPU.

        Raises:
            ValueError: if ``images`` is another string, or there is no such device.
        """
        arguments.one_of("images", images, INPUTS)
        where = arguments.resolve_device(device)
        module = module.eval().to(where)
        return cls(_taking(module, images), name, _fingerprint(module, f"{name} {images}"), where)

    @classmethod
    @isolated
    def of_torchscript(
        cls, path: str | PathLike[str], images: str = "uint8", device: str = "cpu"
    ) -> Features:
        """Return an extractor whose features are the output of a TorchScript file.

        Such a file is a program: load only what you trust. A function with an argument
        ``return_features`` is called with True there, as the Inception file of StyleGAN's authors
        wants it.

        Args:
            path: the file, as torch.jit.save writes it.
            images: what its function is called with: "uint8", or "float" (float32 in [-1, 1]).
            device: "cpu", "cuda", "cuda:N", or "auto" for CUDA where there is a GPU, else the CPU.

        Raises:
            ValueError: if ``images`` is another string, or there is no such device.
            CheckpointError: if the file is missing, or is no TorchScript.
        """
        arguments.one_of("images", images, INPUTS)
        where, file = arguments.resolve_device(device), Path(path)
        require_file(file)
        try:
            with warnings.catch_warnings():  # no replacement can read these files
                warnings.filterwarnings("ignore", ".*torch.jit.load. is deprecated")
                module = torch.jit.load(str(file), map_location=where).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise CheckpointError(f"{file}: cannot be read as TorchScript: {error}") from error
        named = {argument.name for argument in module.forward.schema.arguments}
        options = {"return_features": True} if "return_features" in named else {}
        with open(file, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        key = hashlib.sha256(f"torchscript {digest} {images}".encode()).hexdigest()
        return cls(_taking(module, images, **options), file.name, f"sha256:{key}", where)


def _taking(module: nn.Module, images: str, **options: bool) -> Callable[[Tensor], Tensor]:
    if images == "uint8":
        return lambda x: module(x, **options)
    return lambda x: module(to_float(x), **options)


def _hash_tensor(digest: hashlib._Hash, x: Tensor) -> None:
    x = x.detach().cpu().contiguous()
    digest.update(f"{x.dtype} {tuple(x.shape)}\n".encode())
    digest.update(x.reshape(-1).view(torch.uint8).numpy().data)


def _fingerprint(module: nn.Module, what: str) -> str:
    kind = type(module)
    digest = hashlib.sha256(f"{kind.__module__}.{kind.__qualname__} {what}\n".encode())
    try:  # the code too, where Python has it
        digest.update(inspect.getsource(kind).encode())
    except (OSError, TypeError):
        pass
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} ".encode())
        _hash_tensor(digest, value)
    return f"sha256:{digest.hexdigest()}"


def fingerprint_of(images: Tensor) -> str:
    """Return a hash of a tensor, "sha256:...", that covers its dtype, its shape and every byte.

    Args:
        images: a tensor of any shape, dtype and device.
    """
    digest = hashlib.sha256()
    _hash_tensor(digest, images)
    return f"sha256:{digest.hexdigest()}"


@isolated(grad=False)
def features_of(
    images: Images, extractor: Features, batch_size: int = BATCH, progress: bool = False
) -> Tensor:
    """Return the features of images, float32 [N, D] on the CPU.

    Args:
        images: a tensor uint8 [N, C, H, W], or a data source of N images, N at least 1.
        extractor: called with each batch, uint8 [B, C, H, W] on the CPU; returns float32 [B, D].
        batch_size: the number of images in a batch, at least 1.
        progress: whether a progress bar is shown.

    Raises:
        ValueError: if batch_size is below 1, if there is no image, if images are of another dtype
            or shape, or if the extractor fails, returns what is no finite floating-point tensor [B,
            D], or another D for another batch.
        DataError: if a data source cannot read an image.
    """
    from tqdm import tqdm

    arguments.integer("batch_size", batch_size, 1)
    if not len(images):
        raise ValueError("images: holds none; must hold at least one")
    found: list[Tensor] = []
    bar = tqdm(total=len(images), desc=extractor.name, disable=not progress, unit="image")
    with bar:
        for start in range(0, len(images), batch_size):
            part = extractor(fetch(images, start, min(start + batch_size, len(images))))
            if found and part.shape[1] != found[0].shape[1]:
                raise ValueError(
                    f"features {extractor.name}: gave {part.shape[1]} an image from image {start} "
                    f"on and {found[0].shape[1]} before; must be as many for all"
                )
            found.append(part)
            bar.update(len(part))
    return torch.cat(found)


@isolated(grad=False)
def cached_features(
    images: Images,
    extractor: Features,
    batch_size: int = BATCH,
    *,
    fingerprint: str | None = None,
    folder: Path | None = None,
    progress: bool = False,
) -> Tensor:
    """Return the features of images, float32 [N, D] on the CPU, from a file if computed before.

    A file that is broken, cut short or of other images is replaced by newly computed features. If
    the file cannot be written, a warning is logged.

    Args:
        images: a tensor uint8 [N, C, H, W], or a data source of N images, N at least 1.
        extractor: called with each batch, uint8 [B, C, H, W] on the CPU; returns float32 [B, D].
        batch_size: the number of images in a batch, at least 1.
        fingerprint: a string that identifies the images; None for the data source's own
            ``fingerprint()``, or for a hash of a tensor's dtype, shape and bytes.
        folder: the folder of the files; None for "features" in this project's cache folder.
        progress: whether a progress bar is shown.

    Raises:
        ValueError: if batch_size is below 1, there is no image, images are of another dtype or
            shape, or the extractor fails or returns no finite [B, D].
        DataError: if a data source cannot read an image.
    """
    if fingerprint is None:
        fingerprint = fingerprint_of(images) if isinstance(images, Tensor) else images.fingerprint()
    key = json.dumps([fingerprint, extractor.fingerprint, len(images)])
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    folder = compile_cache.folder() / "features" if folder is None else folder
    path = folder / f"{name}.safetensors"
    if path.exists():
        try:
            return _read(path, key)
        except CheckpointError as error:
            log.warning("features are computed anew: %s", error)
    features = features_of(images, extractor, batch_size, progress)
    try:
        write_atomic(path, save({"features": features, "digest": _digest(key, features)}))
    except OSError as error:
        log.warning("features are not kept: %s", error)
    return features


def _digest(key: str, features: Tensor) -> Tensor:
    """Return a hash of key and features, uint8 [32], by which a damaged file is recognised."""
    digest = hashlib.sha256(key.encode())
    _hash_tensor(digest, features)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8, device="cpu")


def _read(path: Path, key: str) -> Tensor:
    state = read_tensors(path)
    features, digest = state.get("features"), state.get("digest")
    if features is None or digest is None or not torch.equal(digest, _digest(key, features)):
        raise CheckpointError(f"{path}: is damaged, or holds other features")
    return features
