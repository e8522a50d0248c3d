"""Where trials run: the only folder that knows Ray."""

import os

# Read when Ray, or Ray Tune, is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the default of newer versions; older ones warn
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "inf")  # Tune's own snapshots, for a restore that is not used here
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")  # the listener hears of them
