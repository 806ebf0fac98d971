"""Ablation studies: arms (overrides of one base config) trained with several seeds and compared with a baseline arm.

statistics.py     means over seeds, the difference to the baseline with interval and tests, Holm's correction, power
report_page.py    the HTML page: differences, curves of the arms, answers that differ
"""
