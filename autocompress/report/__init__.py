"""What a user sees: the front as table, rows and chart, picking from it, and live progress.

Everything here reads the stable columns of `front.csv` (`columns.COLUMNS`) and nothing else.
"""
