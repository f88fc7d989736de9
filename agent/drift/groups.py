"""Groups of alike labels, as many as the calibration has frames to count."""

from __future__ import annotations

import torch
from torch import Tensor

#: Calibration frames that a group should have on average: histograms with emptier bins differ by
#: chance so much that drift does not show.
FRAMES_PER_GROUP = 8
_ROUNDS = 20


def label_groups(text_KD: Tensor, frames: int) -> Tensor:
    """Which group each label belongs to, one-hot (K, G).

    Where there are frames enough, each label is a group of its own.

    Spherical k-means (Dhillon & Modha 2001) of the labels' unit text features, begun with labels
    far from each other (Gonzalez 1985), so that nothing is random. No frame has a say, so that
    groups are no fuller in the calibration than they will be elsewhere.
    """
    labels = len(text_KD)
    groups = max(2, frames // FRAMES_PER_GROUP)
    if labels <= groups:
        return torch.eye(labels)
    centres_GD = _spread(text_KD, groups)
    for _ in range(_ROUNDS):
        group_K = (text_KD @ centres_GD.T).argmax(dim=-1)
        members_KG = torch.nn.functional.one_hot(group_K, groups).to(text_KD.dtype)
        sums_GD = members_KG.T @ text_KD
        empty_G1 = (members_KG.sum(dim=0) == 0)[:, None]
        centres_GD = torch.where(
            empty_G1, centres_GD, torch.nn.functional.normalize(sums_GD, dim=-1)
        )
    return members_KG.float()


def _spread(text_KD: Tensor, groups: int) -> Tensor:
    """Labels each of which is farthest from those before it, the first nearest to the mean."""
    chosen = [int((text_KD @ text_KD.mean(dim=0)).argmax())]
    likeness_K = text_KD @ text_KD[chosen[0]]
    for _ in range(groups - 1):
        chosen.append(int(likeness_K.argmin()))
        likeness_K = torch.maximum(likeness_K, text_KD @ text_KD[chosen[-1]])
    return text_KD[chosen]
