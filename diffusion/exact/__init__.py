"""Denoisers and likelihoods that are known exactly: oracles, finite data sets, the probability-flow ODE."""
