"""Training and evaluation: the Lightning module, its set-up from a config, callbacks, plots and the run folder."""
