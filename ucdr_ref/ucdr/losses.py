"""The losses of UCDR-Adapter (WACV 2025), a pure function per equation. Imports nothing of the package."""
import torch
import torch.nn.functional as F
from torch import Tensor


def image_text_contrast(f: Tensor, t: Tensor, labels: Tensor, tau: float) -> Tensor:
    """L-align: cross-entropy of f . t_c / tau against the image's class, mean over the batch.

    f [b, e] and t [c, e] are L2-normalised, labels [b] are class indices.
    """
    with torch.autocast(f.device.type, enabled=False):  # float32 whatever the towers' arithmetic
        return F.cross_entropy(f @ t.T / tau, labels)


def triplet(f: Tensor, positives: Tensor, negatives: Tensor, valid: Tensor, margin: float,
            squared: bool = True, all_valid: Tensor | None = None) -> Tensor:
    """L-triplet: (1/r) sum over r pairs of max(0, D(f, I_p) - D(f, I_n) + margin), mean over the batch.

    f [b, e]; positives and negatives [b, r, e], drawn from the momentum queues; valid [b] is False where an
    image has no pair yet: it adds zero. D: Euclidean distance, squared or not (D8). With all_valid [total],
    `valid` of all processes, the mean is over the images that have a pair: the average of the processes'
    values, weighted by their numbers of images, is (D17).
    """
    def distance(other: Tensor) -> Tensor:
        difference = f.unsqueeze(1) - other
        return difference.square().sum(-1) if squared else torch.linalg.vector_norm(difference, dim=-1)  # D8

    hinge = F.relu(distance(positives) - distance(negatives) + margin).mean(dim=1)
    mean = torch.where(valid, hinge, 0.0).mean()
    return mean if all_valid is None else mean * len(all_valid) / all_valid.sum().clamp(min=1)  # D17
