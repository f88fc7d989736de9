"""Labelled streams with a known truth, and what the agent made of them.

photos → schedule (with corruptions) → frames in … verdicts out → scoreboard → live, timeline
"""
