"""Searches carried out: one coordinator owns the Optuna study and asks and tells; what computes never opens it."""
