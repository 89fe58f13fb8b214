"""The benchmark of this library and its peers: ``adaptive-c bench``.

contenders.py says who is measured, suite.py which rows and how, worker.py is a contender's process, model.py predicts
what was measured, and report.py makes tables and pictures of the JSON file.
"""
