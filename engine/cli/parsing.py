"""Parsers of the options --seeds and --labels."""

from __future__ import annotations

from flashddpm import arguments
from flashddpm.networks.conditioning import Conditioning

MAX_SEEDS = 1_000_000


def parse_seeds(seeds: str | None, num_images: int | None) -> list[int]:
    """Return the seeds that the options name, a list of ints in [-2^63, 2^63).

    Args:
        seeds: integers and ranges (first:stop, without stop) with commas between, such as "1,2,5"
            or "0:64"; a single integer, such as "7", is the first of num_images seeds. None for the
            seeds from 0.
        num_images: the number of images; None for as many as seeds are listed, or 64 where seeds
            are None.

    Raises:
        ValueError: if the text is not of this form or names no seed, if a range has more than
            1,000,000 seeds, if one is not in [-2^63, 2^64), if num_images is below 1, or if there
            are not as many seeds as images.
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
    """Return the class labels that the option names, a list of ints, or None for no labels.

    Args:
        labels: numbers or class names (in any case) with commas between, such as "3" (for all
            images) or "0,Boot,2" (one for each); "none", in lower case, for no labels; None for the
            classes in turn: 0, 1, ...
        conditioning: the classes of the model and their names.
        count: the number of images.

    Returns:
        ``count`` labels; None for "none" or, where the option is not given, for a model without
        classes.

    Raises:
        ValueError: if a part is neither a number nor the name of a class, if a number is not in
            0..num_classes-1, if neither one nor ``count`` labels are listed, or if some are though
            the model has no classes.
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
    return arguments.label_list(result * count if len(result) == 1 else result, count, classes)
