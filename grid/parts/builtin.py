"""The built-in parts, but for the named grids. A row says where its code is, and what it takes from a configuration.

References:
    resnet: He et al. 2016, https://arxiv.org/abs/1512.03385
    relu: Nair & Hinton 2010, https://www.cs.toronto.edu/~fritz/absps/reluICML.pdf
    leaky_relu: Maas et al. 2013, https://ai.stanford.edu/~amaas/papers/relu_hybrid_icml2013_final.pdf
    elu: Clevert et al. 2016, https://arxiv.org/abs/1511.07289
    gelu: Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415
    silu: Elfwing et al. 2018, https://arxiv.org/abs/1702.03118
    prelu: He et al. 2015, https://arxiv.org/abs/1502.01852
    tanh: LeCun et al. 1998, https://doi.org/10.1007/3-540-49430-8_2
    sgd: Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html (momentum)
    adam: Kingma & Ba 2015, https://arxiv.org/abs/1412.6980
    rmsprop: Tieleman & Hinton 2012, https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf
    asgd: Polyak & Juditsky 1992, https://doi.org/10.1137/0330046
    adagrad: Duchi et al. 2011, https://jmlr.org/papers/v12/duchi11a.html
    adamw: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101
    nadam: Dozat 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ
    step: He et al. 2016, https://arxiv.org/abs/1512.03385 (section 3.4)
    cosine: Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983
    one_cycle: Smith & Topin 2018, https://arxiv.org/abs/1708.07120
    exponential: Li & Arora 2020, https://arxiv.org/abs/1910.07454
    plateau: torch.optim.lr_scheduler.ReduceLROnPlateau; Goodfellow et al. 2016, https://www.deeplearningbook.org, ch. 8
    l1: Tibshirani 1996, https://doi.org/10.1111/j.2517-6161.1996.tb02080.x
    l2: Krogh & Hertz 1991, https://papers.nips.cc/paper/563-a-simple-weight-decay-can-improve-generalization
    elastic: Zou & Hastie 2005, https://doi.org/10.1111/j.1467-9868.2005.00503.x
    augmentation: Simard et al. 2003, https://doi.org/10.1109/ICDAR.2003.1227801
    label_smoothing: Szegedy et al. 2016, https://arxiv.org/abs/1512.00567
    mixup: Zhang et al. 2018, https://arxiv.org/abs/1710.09412
    weight_averaging: Tarvainen & Valpola 2017, https://arxiv.org/abs/1703.01780
    test_time_shifts: Jordan 2024, https://arxiv.org/abs/2404.00498
"""

from typing import Any

import grid.parts.adding as parts

parts.net("mlp")("grid.train.models:build_mlp")
parts.net("cnn")("grid.train.models:build_cnn")
parts.net("resnet")("grid.train.models:build_resnet")

parts.lr_schedule("constant")("grid.train.techniques.schedules:constant")
parts.lr_schedule("step")("grid.train.techniques.schedules:step")
parts.lr_schedule("cosine")("grid.train.techniques.schedules:cosine")
parts.lr_schedule("one_cycle")("grid.train.techniques.schedules:one_cycle")
parts.lr_schedule("exponential")("grid.train.techniques.schedules:exponential")
parts.lr_schedule("plateau")("grid.train.techniques.schedules:plateau")

# Prelu may learn a negative slope.
parts.activation("relu", shape="rising")("torch.nn:ReLU")
parts.activation("leaky_relu", shape="rising")("torch.nn:LeakyReLU")
parts.activation("elu", shape="rising")("torch.nn:ELU")
parts.activation("gelu", shape="falling_then_rising")("torch.nn:GELU")
parts.activation("silu", shape="falling_then_rising")("torch.nn:SiLU")
parts.activation("prelu", shape="falling_then_rising")("torch.nn:PReLU")
parts.activation("tanh", shape="rising")("torch.nn:Tanh")


def _betas(config: Any) -> dict[str, Any]:
    return {"betas": (config.beta1, config.beta2)}


# The base rates were measured by `python -m benchmarks.base_rates` on real images (the table is in LOG.md). `adamw`
# decays weights separately from the loss. `asgd` has torch's decay term turned off, as decay is what the factor
# `regularization` varies; it follows a schedule one step late, as torch's own does.
parts.optimizer(
    "sgd",
    learning_rate=0.05,
    fused=True,
    options=lambda config: {"momentum": config.momentum},
)("torch.optim:SGD")
parts.optimizer("adam", learning_rate=2e-3, fused=True, options=_betas)("torch.optim:Adam")
parts.optimizer("rmsprop", learning_rate=1e-3, options=lambda config: {"alpha": config.rmsprop_decay})(
    "torch.optim:RMSprop"
)
parts.optimizer("asgd", learning_rate=0.5, options=lambda config: {"lambd": 0.0})("torch.optim:ASGD")
parts.optimizer("adagrad", learning_rate=2e-2, fused=True)("torch.optim:Adagrad")
parts.optimizer(
    "adamw",
    learning_rate=2e-3,
    fused=True,
    options=lambda config: _betas(config) | {"weight_decay": config.weight_decay},
)("torch.optim:AdamW")
parts.optimizer("nadam", learning_rate=2e-3, options=_betas)("torch.optim:NAdam")

parts.regularization("none")("grid.train.techniques.penalties:add_none")
parts.regularization("l1")("grid.train.techniques.penalties:add_l1")
parts.regularization("l2")("grid.train.techniques.penalties:add_l2")
parts.regularization("elastic")("grid.train.techniques.penalties:add_elastic")

parts.on_images("augmentation", levels=("none", "shift", "affine", "elastic"))(
    "grid.train.techniques.augmentation:augment"
)
parts.setting(
    "augmentation_strength",
    1.0,
    matters_with=("augmentation", ("shift", "affine", "elastic")),
    rule=("above 0 and at most 5", lambda strength: 0 < strength <= 5),
)
parts.on_batch("label_smoothing", levels=("off", "on"))("grid.train.techniques.soft_targets:smooth_labels")
parts.setting(
    "label_smoothing_rate",
    0.1,
    matters_with=("label_smoothing", ("on",)),
    rule=("between 0 and 1, both excluded", lambda share: 0 < share < 1),
)
parts.on_batch("mixup", levels=("off", "on"))("grid.train.techniques.soft_targets:mix")
parts.setting(
    "mixup_alpha",
    0.2,
    matters_with=("mixup", ("on",)),
    rule=("above 0 and at most 100", lambda alpha: 0 < alpha <= 100),
)
parts.on_averages("weight_averaging", levels=("off", "ema"))("grid.train.techniques.averaging:update_ema")
parts.setting(
    "ema_decay",
    0.999,
    matters_with=("weight_averaging", ("ema",)),
    rule=("0 or more and below 1", lambda decay: 0 <= decay < 1),
)
parts.on_prediction("test_time_shifts", levels=("off", "on"))("grid.train.techniques.augmentation:predict_shifted")

parts.exclude("adamw decays the weights already; l2 in the loss would decay them twice")(
    lambda cell: cell["optimizer"] == "adamw" and cell["regularization"] in ("l2", "elastic")
)
