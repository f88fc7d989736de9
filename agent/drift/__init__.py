"""How far recent frames are from normal ones, by camera and by site, and when that counts.

    frame ─ statistics ─→ vector ─ window ─→ recent mean ─ distances ─→ score ┐
                                                                              ├─→ event
    calibration ─ windows of its own frames ─→ what chance scores ─→ threshold ┘
    entropy, energy, agreement ─ ADWIN, Page–Hinkley ─→ change points

The operator sets how many frames shall pass between two false alarms; nothing else is tuned.
"""
