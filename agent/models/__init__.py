"""The offline checkpoint: the files in ``offline/`` and the code that makes them again."""
