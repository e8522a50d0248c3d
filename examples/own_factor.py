"""python -m grid.run --grid smoke --only model=mlp --parts examples/own_factor.py

Adds a factor to the grid: label smoothing, Szegedy et al. 2016, https://arxiv.org/abs/1512.00567.
"""

from grid import parts


@parts.on_loss("label_smoothing", levels=("off", "0.05", "0.1"))
def smooth(loss, logits, labels, use):
    share = float(use.level)
    return (1 - share) * loss - share * logits.log_softmax(dim=1).mean()
