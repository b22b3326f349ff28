"""Turning a trained change down afterwards, without training again.

Read in this order: `adapter` (what can be scaled), `shares` (what each part learned and damaged), `settings` (from
those to scales), `measure` (what a setting does), `run` (the curve and the point that a budget allows).
"""
