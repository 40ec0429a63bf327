"""The loops: teacher, traces, calibration, reinforcement; and what starts them."""
