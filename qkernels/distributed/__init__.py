"""Ranks that share a batch: process groups and agreement on a call, and softmaxes over a split vocabulary."""
