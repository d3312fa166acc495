"""Find contradictions in class lists and in lists of labelled images.

What cannot be right is refused: one path with two labels, one path in two splits, two classes of one name. What may be
meant, such as class names that differ only in case, is returned as a notice.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping, Sequence

from cafo.class_folders import is_utf8, readable
from cafo.errors import DatasetError
from cafo.items import Item

_SHOWN = 5


def check_class_names(names: Sequence[str], where: object, *, repeated: bool = False) -> tuple[str, ...]:
    """Check a class list, and return notices about names that are easily confused.

    Args:
        names: the class list.
        where: the file or folder that it comes from, for the messages.
        repeated: return a notice about two classes of one name instead of an error, for a published list.

    Raises:
        DatasetError: a name that is blank, not UTF-8, or the name of another class too.
    """
    if wrong := [label for label, name in enumerate(names) if not name.strip() or not is_utf8(name)]:
        raise DatasetError(f"{where}: class {wrong[0]} has the name '{readable(names[wrong[0]])}'; give it another")
    notices = []
    if twice := _groups(names, names):
        labels = "; ".join(f"{name!r} is the name of classes {', '.join(map(str, at))}" for name, at in twice.items())
        if not repeated:
            raise DatasetError(f"{where}: {labels}; classes are told apart by name, so give each its own")
        notices.append(f"{labels}: they get the same sentences")
    alike = _groups(names, [" ".join(name.casefold().replace("_", " ").split()) for name in names])
    confused = [sorted({names[label] for label in at}) for at in alike.values()]
    notices += [
        f"classes {' and '.join(map(repr, group))} differ only in case, spaces or underscores; one class or several?"
        for group in confused
        if len(group) > 1
    ]
    return tuple(notices)


def infer_classes(items: Iterable[Item], where: object) -> tuple[str, ...]:
    """Return the class list that the (label, name) pairs of `items` spell out.

    Raises:
        DatasetError: a label with two names, or a label below the largest that has no image.
    """
    names: dict[int, str] = {}
    for item in items:
        if names.setdefault(item.label, item.class_name) != item.class_name:
            raise DatasetError(
                f"{where} gives label {item.label} two names: {names[item.label]!r} and {item.class_name!r} "
                f"({item.path})"
            )
    if gaps := sorted(set(range(len(names))) - set(names)):
        raise DatasetError(
            f"{where} has no train or val image of label {gaps[0]}; give the class list as `class_names`"
        )
    return tuple(names[label] for label in range(len(names)))


def check_labels(items: tuple[Item, ...], names: Sequence[str], where: object) -> tuple[Item, ...]:
    """Return `items` if every label and class name agrees with the class list.

    Raises:
        DatasetError: an item whose label and class name do not agree with it.
    """
    for item in items:
        if item.label >= len(names) or names[item.label] != item.class_name:
            expected = repr(names[item.label]) if item.label < len(names) else f"beyond the {len(names)} classes"
            raise DatasetError(
                f"{where}: {item.path} has label {item.label} and class {item.class_name!r}, "
                f"but that label is {expected} in the class list; the list should name the labels in their order"
            )
    return items


def check_items(items: Sequence[Item], where: object) -> None:
    """Check the images of a split.

    Raises:
        DatasetError: a path with two labels, or one that is not UTF-8.
    """
    labelled: dict[str, Item] = {}
    for item in items:
        if not is_utf8(item.path):
            raise DatasetError(f"{where}: the path '{readable(item.path)}' is not UTF-8; rename the file")
        first = labelled.setdefault(_normal(item.path), item)
        if first.label != item.label:
            raise DatasetError(
                f"{where}: {item.path} has two labels: {first.class_name!r} and {item.class_name!r}; keep one"
            )


def check_disjoint(splits: Mapping[str, Sequence[Item]], where: object) -> None:
    """Check that no image is in two splits {name: images}.

    Raises:
        DatasetError: paths that are in two splits; the first are named.
    """
    seen: dict[str, str] = {}
    shared: dict[tuple[str, str], list[str]] = {}
    for split, items in splits.items():
        for item in items:
            first = seen.setdefault(_normal(item.path), split)
            if first != split:
                shared.setdefault((first, split), []).append(item.path)
    if shared:
        found = "; ".join(
            f"{len(paths)} images are in {one} and in {two}: {', '.join(paths[:_SHOWN])}{' …' * (len(paths) > _SHOWN)}"
            for (one, two), paths in shared.items()
        )
        raise DatasetError(f"{where}: {found}; an image belongs to one split")


def class_changes(before: Sequence[str], now: Sequence[str]) -> str:
    """Return how a class list differs from an earlier one, class by class; empty if it does not."""
    if list(before) == list(now):
        return ""
    gone, new = ([name for name in one if name not in {*other}] for one, other in ((before, now), (now, before)))
    if not gone and not new:
        moved = next((old, name) for old, name in zip([*before, ""], [*now, ""], strict=False) if old != name)
        return f"the same classes in another order: {moved[0]!r} was where {moved[1]!r} is now"
    if len(before) == len(now) and [before.index(name) for name in gone] == [now.index(name) for name in new]:
        pairs = [f"{old!r} is now {name!r}" for old, name in zip(gone, new, strict=True)]
        return f"renamed: {_some(pairs)}"
    parts = [
        f"{what}: {_some([repr(n) for n in names])}" for what, names in (("removed", gone), ("added", new)) if names
    ]
    return "; ".join(parts)


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:_SHOWN]) + (f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else "")


def _groups(names: Sequence[str], keys: Sequence[str]) -> dict[str, list[int]]:
    """Return the positions of names with equal keys, by the first such name, where there are several."""
    found: dict[str, list[int]] = {}
    for label, key in enumerate(keys):
        found.setdefault(key, []).append(label)
    return {names[at[0]]: at for at in found.values() if len(at) > 1}


def _normal(path: str) -> str:
    return posixpath.normpath(path) if "./" in path or "//" in path else path
