"""What the agent says beside the label: strangeness of the frame, confidence."""
