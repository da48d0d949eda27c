"""`python -m leanattn`: run.py is the demo, timing.py its clock, info.py says what is installed."""
