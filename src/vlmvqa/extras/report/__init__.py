"""The HTML report of a run: answers, curves, calibration, attributions."""
