"""Knowledge distillation, early exits and federated early-exit training, built up in the notebooks under nbs/."""

__version__ = "0.1.0"
