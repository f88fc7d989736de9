"""Unknown frames that are worth a look: found, chosen, kept, and shown to a person.

    flagged frames ─ keeper: new? strange enough? allowed? ─→ store ─ review → contact sheet

The keeper stands beside the hot path: it sees flagged frames only, and whatever befalls its store
stays there.
"""
