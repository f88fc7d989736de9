"""`python -m agent` is the same as `tta-agent`."""

from agent.cli import main

if __name__ == "__main__":
    main()
