"""python -m grid.run --grid smoke --only model=mlp --parts examples/own_factor.py

Adds a factor to the grid: clipping of gradients, Pascanu et al. 2013, https://arxiv.org/abs/1211.5063.
"""

from torch.nn.utils import clip_grad_norm_

from grid import parts


@parts.on_gradients("clipping", levels=("off", "1.0", "0.1"))
def clip(parameters, use):
    clip_grad_norm_(parameters, float(use.level))
