"""The compiled step: its variables, its programs and their tuning."""
