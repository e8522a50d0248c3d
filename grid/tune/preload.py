"""What a worker process imports before it has anything to do, while the driver is still busy."""

import gc

gc.disable()  # a million objects are allocated and none is freed: looking for garbage would take a quarter of the time
try:
    import torch._dynamo  # noqa: F401  (every optimizer imports it at its first step)

    import grid.tune.tuner  # noqa: F401

    gc.freeze()
finally:
    gc.enable()
