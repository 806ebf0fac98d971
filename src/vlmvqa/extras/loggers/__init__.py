"""Experiment loggers, chosen by `logger=`."""
