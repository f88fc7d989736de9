"""How far recent frames are from normal ones, by camera and by site, and when that counts.

    frame ─ statistics ─→ vector ─ window ─→ recent mean ─ distances ─→ score ┐
                                                                              ├─→ event
    calibration ─ windows of its own frames ─→ what chance scores ─→ threshold ┘
    entropy, energy, agreement ─ ADWIN, Page–Hinkley ─→ change points

Style is measured on the pictures as they come, and so tells of the world. The embedding is the
strategy's: where the agent corrects a domain, embedding drift is what the correction has left.

The operator sets how many frames shall pass between two false alarms. That holds for frames that
show different things; frames of one thing are fewer than they seem, and a camera that looks at it
for as long as its window is far from normal in what it shows.
"""
