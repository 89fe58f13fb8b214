"""The benchmark of this library and its peers: ``adaptive-c bench``.

contenders.py holds the contenders that are measured, rows.py those for gradients of a few rows, suite.py decides which
rows are measured and how, worker.py is the process of one contender, model.py predicts the measured times, and
report.py makes tables and pictures from the JSON file.
"""
