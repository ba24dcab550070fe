"""Which classes of two data sets are the same thing, so that a network trained on one can be evaluated on the other.

Torch-free. Declared once per data set: each class that others have too is given a concept, and two classes are the same
if they have the same concept. Several classes of one data set may have one concept, as bicycle and motorcycle of KP are
bike; they then count as one. The network chooses among all of its own classes, and what it chose is translated.

Everything else, on either side, is one further class, OTHER: a shared class predicted where the label is something else
is a false positive, and a shared class taken for something else is missed. Of OTHER itself no score is given. Pixels
that the target ignores stay ignored. That is the rule of PASCAL VOC with OTHER as its background. Leaving the pixels of
unshared classes out instead, which is usual where nearly all classes are shared (GTA to Cityscapes), would here hide
nearly every false positive: nine tenths of MF are "unlabeled".
"""

from dataclasses import dataclass

import numpy as np

from crm.data.specs import DATASETS, DatasetSpec

OTHER = "other"

# data set -> class -> concept
CONCEPTS: dict[str, dict[str, str]] = {
    "synthetic": {"road": "road", "car": "car", "person": "person", "cone": "cone"},
    "mf": {"car": "car", "person": "person", "bike": "bike", "color_cone": "cone"},
    # its survivor is a heated dummy that lies or sits in a tunnel, not the person of a road scene
    "pst900": {},
    "kp": {
        "road": "road",
        "car": "car",
        "person": "person",
        "rider": "person",
        "bicycle": "bike",
        "motorcycle": "bike",
    },
}


@dataclass(frozen=True, eq=False)
class Mapping:
    """From the ids of two data sets to one list of classes."""

    classes: tuple[str, ...]  # OTHER, then the shared concepts in the order of the target's classes
    labels: np.ndarray  # (256,) uint8: the target's label id -> class here, or its ignore_index
    predictions: np.ndarray  # (k,) uint8: the network's class -> class here
    ignore_index: int = 255


def mapping(trained: DatasetSpec, target: DatasetSpec) -> Mapping | None:
    """How a network trained on one data set is scored on another; None where both have the same classes.

    ValueError where no class is shared.
    """
    if trained.classes == target.classes:
        return None
    own, theirs = CONCEPTS[trained.name], CONCEPTS[target.name]
    shared = list(dict.fromkeys(theirs[name] for name in target.classes if theirs.get(name) in own.values()))
    if not shared:
        raise ValueError(
            f"{trained.title} and {target.title} share no class: {trained.title} has {', '.join(trained.classes)}; "
            f"{target.title} has {', '.join(target.classes)} (crm/data/mapping.py declares which are the same)"
        )
    ids = {concept: number for number, concept in enumerate(shared, 1)}
    labels = np.zeros(256, np.uint8)
    labels[: target.num_classes] = [ids.get(theirs.get(name, ""), 0) for name in target.classes]
    labels[target.ignore_index] = Mapping.ignore_index
    predictions = np.array([ids.get(own.get(name, ""), 0) for name in trained.classes], np.uint8)
    return Mapping((OTHER, *shared), labels, predictions)


assert CONCEPTS.keys() == DATASETS.keys()
