"""Several trainings of one command, of launch/study.py and launch/sweep.py: their settings, and one after the other."""
