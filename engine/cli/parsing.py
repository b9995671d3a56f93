"""Seeds and labels as text."""

from __future__ import annotations

from flashddpm import arguments
from flashddpm.networks.conditioning import Conditioning

MAX_SEEDS = 1_000_000


def parse_seeds(seeds: str | None, num_images: int | None) -> list[int]:
    """Return the seeds that the options name: "7", "1,2,5", "0:64", or one and a count.

    Raises:
        ValueError: not of that form, or another number of seeds than of images.
    """
    if num_images is not None:
        arguments.integer("num_images", num_images, 1)
    if seeds is None:
        return list(range(64 if num_images is None else num_images))
    result: list[int] = []
    try:
        for part in seeds.split(","):
            low, colon, high = part.partition(":")
            stop = int(high) if colon else int(low) + 1
            if stop - int(low) > MAX_SEEDS:
                raise OverflowError
            result += range(int(low), stop)
    except OverflowError:
        raise ValueError(f"seeds={seeds!r}: must be at most {MAX_SEEDS} at a time") from None
    except ValueError:
        raise ValueError(
            f"seeds={seeds!r}: must be integers and ranges, such as 7 or 1,2,5 or 0:64"
        ) from None
    if len(result) == 1 and num_images is not None:
        result = list(range(result[0], result[0] + num_images))
    if num_images is not None and len(result) != num_images:
        raise ValueError(f"seeds={seeds!r}: {len(result)} seeds for num_images={num_images}")
    return arguments.seed_list(result)


def parse_labels(labels: str | None, conditioning: Conditioning, count: int) -> list[int] | None:
    """Return a label for each image; without the option, the classes in turn.

    Raises:
        ValueError: no number or class name, or another number of labels than 1 or ``count``.
    """
    classes, names = conditioning.num_classes, conditioning.class_names or ()
    if labels is None:
        return None if classes is None else [i % classes for i in range(count)]
    if labels == "none":
        return None
    lower = [name.lower() for name in names]
    result = []
    for part in (part.strip() for part in labels.split(",")):
        if part.lower() in lower:
            result.append(lower.index(part.lower()))
            continue
        try:
            result.append(int(part))
        except ValueError:
            known = f" or one of {', '.join(names)}" if names else ""
            raise ValueError(f"labels: {part!r} must be a number{known}") from None
    return result * count if len(result) == 1 else result
