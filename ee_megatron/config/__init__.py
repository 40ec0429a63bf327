"""Settings of a run: the schema, how it is filled, checked and identified.

Importing this package does not import torch, so that a wrong setting is reported at once.
"""
